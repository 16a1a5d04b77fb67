"""`Source`: where embeddings come from; `Labels`: rows of embeddings with labels and folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict

import numpy as np

from rd_torch.choices import HeadName, LearningTask
from rd_torch.embedder import require_prefixes
from rd_torch.embedding import embed, embed_to_store
from rd_torch.learning.examples import Examples
from rd_torch.learning.learned import work_folder
from rd_torch.learning.selecting import Rows
from rd_torch.learning.splitting import Split
from rd_torch.model import RDModel
from rd_torch.pooling import Pools, cut_ways, pool_name
from rd_torch.store import ProgressCallback, open_store

MOST_ROWS: Final = 50_000
"""Number of residues that teach at the most, and that judge; of more a part is drawn."""


class LearnOptions(TypedDict, total=False):
    """Options of `learn`, where they are described."""

    task: LearningTask | None
    head: HeadName | None
    per_residue: bool
    sequence_column: str | None
    split_column: str | None
    pool: Pools
    widths: Sequence[int] | None
    tokens_per_batch: int | None
    name: str
    loading: Mapping[str, Any]
    progress: ProgressCallback


class Source(NamedTuple):
    """What embeddings come from, and how they are cut."""

    model: RDModel
    name: str
    loading: dict[str, Any]
    pool: str
    widths: list[int]

    @classmethod
    def of(cls, model: RDModel | str, options: LearnOptions) -> Source:
        """Load the chain, and check the pooling and the widths."""
        name = options.get("name", model if isinstance(model, str) else "")
        pool = "none" if options.get("per_residue") else pool_name(options.get("pool", "mean"))
        if pool == "none" and not options.get("per_residue"):
            raise ValueError(
                "expected a pool that gives a vector a sequence, got 'none': or give per_residue"
            )
        chain = RDModel.from_pretrained(model) if isinstance(model, str) else model
        require_prefixes(chain.config, pool)
        widths = sorted(set(options.get("widths") or chain.config.widths.values()))
        for width in widths:
            chain.config.require_width(width)
        return cls(chain, name, dict(options.get("loading", {})), pool, widths)

    def level(self, width: int) -> str:
        """Return the name of the last level that a width needs."""
        return self.model.config.levels_for(width)[-1]


def embed_examples(
    source: Source, sequences: Sequence[str], output: str | Path | None, options: LearnOptions
) -> Sequence[np.ndarray]:
    """Embed each different sequence once, at the widest width, and return the embedding of every one."""
    distinct = list(dict.fromkeys(sequences))
    width, budget = source.widths[-1], options.get("tokens_per_batch")
    if output is None:
        rows = embed(source.model, distinct, pool=source.pool, width=width, tokens_per_batch=budget)
        places = {each: place for place, each in enumerate(distinct)}
        return [rows[places[each]] for each in sequences]
    path = work_folder(Path(output)) / ("embeddings.h5" if source.pool == "none" else "embeddings.parquet")
    records = [(f"s{number}", each) for number, each in enumerate(distinct)]
    names = {each: identifier for identifier, each in records}
    progress = options.get("progress", lambda residues, before: None)
    failures = embed_to_store(
        source.model, records, path, pool=source.pool, width=width, tokens_per_batch=budget, progress=progress
    )
    for failure in failures.values():
        raise ValueError(f"expected sequences that can be embedded, got one that cannot: {failure.reason}")
    if source.pool == "none":
        return OnDisk(path, [names[each] for each in sequences])
    with open_store(path) as store:
        found = store.read([names[each] for each in distinct])
        rows_of = dict(zip(distinct, found, strict=True))
    return [rows_of[each] for each in sequences]


class OnDisk(Sequence[np.ndarray]):
    """Embeddings of residues that are read from a store one sequence at a time, so that memory stays bounded.

    Args:
        path: the store.
        identifiers: the record of each sequence.
    """

    def __init__(self, path: Path, identifiers: Sequence[str]) -> None:
        self._store, self._identifiers = open_store(path), identifiers

    def __len__(self) -> int:
        return len(self._identifiers)

    def __getitem__(self, place: Any) -> Any:
        return self._store.read(self._identifiers[place])


class Labels(NamedTuple):
    """Rows of labels, and the fold of each."""

    rows: Rows
    folds: np.ndarray
    sequences: int


def labels_of(
    source: Source, examples: Examples, split: Split, vectors: Sequence[np.ndarray], chosen: np.ndarray
) -> Labels:
    """Return the labelled rows of the chosen sequences: one for each, or for each of their residues."""
    places = np.flatnonzero(chosen)
    labels = [examples.labels[place] for place in places]
    if examples.per_residue:
        owners = np.repeat(places, [len(each) for each in labels])
        flat = np.concatenate(labels)
        known = np.flatnonzero(~np.isnan(flat) if examples.task == "regression" else flat >= 0)
        if len(known) > MOST_ROWS:
            known = np.sort(np.random.default_rng(0).choice(known, MOST_ROWS, replace=False))
        ends = np.cumsum([0, *(len(each) for each in labels)])
        bounds = np.searchsorted(known, ends[1:-1])
        parts = [
            vectors[int(place)][own - start]
            for place, start, own in zip(places, ends, np.split(known, bounds), strict=False)
        ]
        matrix, values, owners = np.concatenate(parts), flat[known], owners[known]
    else:
        matrix, values, owners = np.stack([vectors[int(place)] for place in places]), np.array(labels), places
    rows = Rows(
        examples.task,
        values,
        max(1, len(examples.classes)),
        np.unique(split.groups[owners], return_inverse=True)[1],
        lambda width: cut_ways(matrix, width, source.pool),
    )
    return Labels(rows, split.folds[owners], len(places))
