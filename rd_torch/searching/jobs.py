"""`search`: proteins to what is near them, as an iterator or into a table that survives a kill."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from rd_torch.disk import part_folder, require_folder, take_lock, write_whole
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.reading import entries_of
from rd_torch.searching.finding import Finder
from rd_torch.searching.hits import USUAL, Hit, Transferred
from rd_torch.searching.index import Index
from rd_torch.searching.labels import Labels, LabelTransfer
from rd_torch.sequences import normalize_entries
from rd_torch.store import Failure, Names, Window, cut_windows, failure_list, write_failures
from rd_torch.threads import run_ahead

TOKENS_OF_A_WINDOW: Final = 8_192
"""A sixteenth of the number of tokens in the queries that are searched together; a kill loses so many."""

SUFFIXES: Final = (".tsv", ".jsonl")
DIGITS: Final = 6

Found = Hit | Transferred
Progress = Callable[[int, bool], object]


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
    """
    finder = Finder(model, index, **options)
    for window in _windows(proteins, model, Names(str)):
        failures: dict[int, str] = {}
        yield from finder.hits(window, failures)
        for place, reason in failures.items():
            raise ValueError(f"{reason}, in query {window.names[place]}")


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
    """
    transfer = LabelTransfer(finder := Finder(model, index, **options), labels, least)
    for window in _windows(proteins, model, Names(str)):
        failures: dict[int, str] = {}
        yield from _transferred(transfer, finder, window, failures)
        for place, reason in failures.items():
            raise ValueError(f"{reason}, in query {window.names[place]}")


def search_to_file(  # noqa: PLR0913
    model: RDModel,
    proteins: Iterable[Any],
    index: Index,
    output: str | Path,
    *,
    columns: Sequence[str] = USUAL,
    labels: Labels | None = None,
    least: float = 0.5,
    progress: Progress = lambda residues, before: None,
    **options: Unpack[SearchOptions],
) -> dict[str, Failure]:
    """Search, and write a table of what was found.

    The same call after a kill goes on where it was: what is found of a window of queries lies in
    `<output>.part` until the table is whole. Queries that cannot be embedded are left out, and
    `<output>.failed.tsv` lists them with their lines and the reasons.

    Args:
        model: the model that made the stores of the index.
        proteins: as in `search`.
        index: the index.
        output: the table: `.tsv` with a header row, or `.jsonl` with an object in each line.
        columns: columns of the table of hits, among the fields of `Hit`; labels have those of `Transferred`.
        labels: if given, labels are transferred, as by `transfer_labels`, and the table is of them.
        least: reliability below which nothing counts as near.
        progress: function that is called with a number of residues that are done, and with True if an earlier
            run did them, else False.
        **options: as in `search`.

    Returns:
        The queries that could not be embedded, by name.

    Raises:
        FileNotFoundError: where the folder of the output does not exist.
        BlockingIOError: where another process writes the same output.
        ValueError: as in `search`; for another suffix, no queries, and an output that was begun otherwise.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"expected an output that ends in {' or '.join(SUFFIXES)}, got {str(output)!r}")
    require_folder(output)
    finder = Finder(model, index, **options)
    transfer = None if labels is None else LabelTransfer(finder, labels, least)
    fields = Transferred._fields if transfer else tuple(columns)
    folder = part_folder(output)
    folder.mkdir(exist_ok=True)
    lock = take_lock(folder, output)
    try:
        _begin(folder, output, _settings(finder, labels, least, fields))
        parts, failures = [], {}
        names = Names(str)
        for window in _windows(proteins, model, names):
            part = folder / f"{window.number:06d}-{window.checksum}"
            failed = part.with_name(f"{part.name}.failed")
            if not part.is_file():
                reasons: dict[int, str] = {}
                found = (
                    finder.hits(window, reasons)
                    if transfer is None
                    else _transferred(transfer, finder, window, reasons)
                )
                text = "".join(_line(each, fields, output.suffix) for each in found)
                write_whole(
                    failed, lambda path, given=reasons: path.write_text(json.dumps(list(given.items())))
                )
                write_whole(part, lambda path, given=text: path.write_text(given, encoding="utf-8"))
                progress(window.residues, False)
            else:
                progress(window.residues, True)
            failures |= _failures(window, json.loads(failed.read_text()))
            parts.append(part)
        if not parts:
            raise ValueError("expected at least one query, got none")
        write_whole(output, lambda path: _join(path, parts, fields if output.suffix == ".tsv" else ()))
        write_failures(failure_list(output), list(failures.items()))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return failures


def _windows(proteins: Iterable[Any], model: RDModel, names: Names) -> Iterator[Window[str]]:
    """Yield queries in windows, read ahead."""
    corrections = Corrections()
    read = normalize_entries(entries_of(proteins, "word"), corrections, kind=model.alphabet.kind)
    with closing(run_ahead(cut_windows(read, TOKENS_OF_A_WINDOW, names), 1)) as windows:
        yield from windows
    corrections.warn()


def _transferred(
    transfer: LabelTransfer, finder: Finder, window: Window[str], failures: dict[int, str]
) -> Iterator[Transferred]:
    """Yield the labels of the queries of a window."""
    queries, vectors = finder.embed(window, failures)
    for query, near in zip(queries, transfer.near(vectors), strict=True):
        yield from transfer.of(window.names[query], near)


def _settings(finder: Finder, labels: Labels | None, least: float, fields: Sequence[str]) -> dict[str, Any]:
    """Return all that a table depends on beside the queries."""
    config = finder.index.config
    return {
        "stores": [source.checksum for source in config.sources],
        "fingerprint": config.facts.fingerprint,
        "first_width": config.first_width,
        "k": finder.k,
        "candidates": finder.candidates,
        "first_stage_only": finder.first_stage_only,
        "labels": ""
        if labels is None
        else _digest(sorted((n, *sorted(w)) for n, w in labels.by_name.items())),
        "least": least,
        "columns": list(fields),
    }


def _digest(content: Any) -> str:
    """Return a digest of something that JSON can hold."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _begin(folder: Path, output: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a table that is begun; refuse to go on with others."""
    path = folder / "settings.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ValueError(
                    f"expected {name} {begun.get(name)}, with which {output} was begun, got {value}: use "
                    "what it was begun with, or choose another output"
                )
    write_whole(path, lambda part: part.write_text(json.dumps(settings)))


def _line(found: Found, fields: Sequence[str], suffix: str) -> str:
    """Return the line of a table for what was found."""
    values = {
        name: round(value, DIGITS) if isinstance(value := getattr(found, name), float) else value
        for name in fields
    }
    if suffix == ".jsonl":
        return json.dumps(values, ensure_ascii=False) + "\n"
    cells = (f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value) for value in values.values())
    return "\t".join(cell.replace("\t", " ") for cell in cells) + "\n"


def _join(path: Path, parts: Sequence[Path], header: Sequence[str]) -> None:
    """Write parts one after the other, behind a header row if there is one."""
    with path.open("w", encoding="utf-8", newline="") as whole:
        if header:
            csv.writer(whole, delimiter="\t", lineterminator="\n").writerow(header)
        for part in parts:
            with part.open(encoding="utf-8", newline="") as file:
                shutil.copyfileobj(file, whole)


def _failures(window: Window[str], reasons: Sequence[tuple[int, str]]) -> dict[str, Failure]:
    """Return what could not be embedded of a window, by name."""
    found = {}
    for place, reason in reasons:
        source, line = window.origins[place]
        found[window.names[place]] = Failure(window.lengths[place] or 0, reason, source, line)
    return found
