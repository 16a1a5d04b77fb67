"""`search` and `transfer_labels`: from proteins to what is near them, window by window."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, Final, TypedDict, TypeVar, Unpack

from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.reading import entries_of
from rd_torch.searching.finding import Finder
from rd_torch.searching.hits import Hit, Transferred
from rd_torch.searching.index import Index
from rd_torch.searching.labels import Labels, LabelTransfer
from rd_torch.sequences import normalize_entries
from rd_torch.store import Names, Window, cut_windows
from rd_torch.threads import run_ahead

Found = TypeVar("Found", Hit, Transferred)

TOKENS_OF_A_WINDOW: Final = 8_192
"""A sixteenth of the number of tokens in the queries that are searched together."""


class SearchOptions(TypedDict, total=False):
    """Options of `search`, where they are described."""

    k: int
    candidates: int
    first_stage_only: bool
    tokens_per_batch: int | None


def search(
    model: RDModel, proteins: Iterable[Any], index: Index, **options: Unpack[SearchOptions]
) -> Iterator[Hit]:
    """Find the proteins of an index that are near others.

    Similarities are cosines after centring: each vector is taken as its distance from the mean of the index's
    proteins. The first stage compares the first features alone, and hands its candidates to the second, which
    reads their whole vectors from the stores. Queries are embedded as the stores were, window by window.

    Args:
        model: the model that made the stores of the index.
        proteins: `rd_torch.Fasta` or `rd_torch.Proteins`, or an iterable of `(identifier, sequence)` pairs or
            records. It may be a generator.
        index: the index.
        **options: `k` is the number of proteins to find for each query, by default 10; `candidates` that
            which the first stage hands on, by default 300. With `first_stage_only` there is no second stage,
            and backbones beyond the first features do not run. `tokens_per_batch` is as in `embed`.

    Yields:
        The hits, query by query in order, most similar first. Queries of one name get names of their own, as
        in stores.

    Raises:
        ValueError: for another model than that of the index, numbers that do not fit, and a query that cannot
            be embedded, with its line.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> letters = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIF"
        >>> proteins = [(f"piece {start}", letters[start : start + 15]) for start in range(24)]
        >>> _ = rd_torch.embed_to_store(model, proteins, "pieces.parquet")
        >>> index = rd_torch.build_index("pieces.parquet", "pieces.index")
        >>> for hit in rd_torch.search(model, [("a query", letters[8:22])], index, k=2):
        ...     print(hit.rank, hit.target, f"{hit.similarity:.1f}")
        1 piece 7 0.9
        2 piece 6 0.8
    """
    yield from _found(Finder(model, index, **options).hits, proteins, model)


def transfer_labels(
    model: RDModel,
    proteins: Iterable[Any],
    index: Index,
    labels: Labels,
    *,
    least: float = 0.5,
    **options: Unpack[SearchOptions],
) -> Iterator[Transferred]:
    """Give proteins the labels of labelled proteins near them.

    Only labelled proteins of the index are searched. How reliable a label is follows from the index's own
    labelled proteins: which share of pairs of them that are as near have a label in common.

    Args:
        model: the model that made the stores of the index.
        proteins: as in `search`.
        index: the index.
        labels: labels of proteins in the index.
        least: reliability below which nothing counts as near.
        **options: as in `search`.

    Yields:
        The labels, query by query in order, nearest first; for a query that nothing is near, one row with an
        empty label and the reliability of the nearest protein.

    Raises:
        ValueError: as in `search`; and for fewer than 20 labelled proteins in the index.
        ModuleNotFoundError: where scikit-learn is not installed.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> letters = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIF"
        >>> proteins = [(f"piece {start}", letters[start : start + 15]) for start in range(24)]
        >>> _ = rd_torch.embed_to_store(model, proteins, "pieces.parquet")
        >>> index = rd_torch.build_index("pieces.parquet", "pieces.index")
        >>> ends = {name: frozenset(["early" if number < 12 else "late"])
        ...     for number, (name, _) in enumerate(proteins)}
        >>> labels = rd_torch.searching.Labels(ends, "end")
        >>> found = rd_torch.transfer_labels(model, [("a query", letters[2:17])], index, labels)
        >>> next(found).label
        'early'
    """
    transfer = LabelTransfer(Finder(model, index, **options), labels, least)
    yield from _found(transfer.labels, proteins, model)


def _found(
    find: Callable[[Window[str], dict[int, str]], Iterator[Found]], proteins: Iterable[Any], model: RDModel
) -> Iterator[Found]:
    """Yield what is found of queries; raise a ValueError for one that cannot be embedded."""
    for window in windows_of(proteins, model, Names(str)):
        failures: dict[int, str] = {}
        yield from find(window, failures)
        for place, reason in failures.items():
            raise ValueError(f"{reason}, in query {window.names[place]}")


def windows_of(proteins: Iterable[Any], model: RDModel, names: Names) -> Iterator[Window[str]]:
    """Cut queries into windows, which are read ahead.

    Args:
        proteins: the queries.
        model: the model that will embed them.
        names: gives queries of one name names of their own.

    Yields:
        The windows.
    """
    corrections = Corrections()
    read = normalize_entries(entries_of(proteins, "word"), corrections, kind=model.alphabet.kind)
    with closing(run_ahead(cut_windows(read, TOKENS_OF_A_WINDOW, names), 1)) as windows:
        yield from windows
    corrections.warn()
    if names.renamed:
        warnings.warn(
            "queries whose identifier an earlier query has, listed as IDENTIFIER#2 and so on: "
            f"{names.renamed:,}",
            stacklevel=3,
        )
