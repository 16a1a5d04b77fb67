"""Label transfer: labels of the proteins near a query, and how reliable they are at that distance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rd_torch.reading import read_cells
from rd_torch.searching.finding import Finder, Near
from rd_torch.searching.hits import Transferred
from rd_torch.searching.reliability import Pair, Reliability
from rd_torch.store import Window

PROTEINS_COMPARED: Final = 2_000
"""Number of labelled proteins, evenly spread, by whose neighbours reliability is known."""

LEAST_LABELLED: Final = 20
"""Number of labelled proteins below which nothing can be said of reliability."""


@dataclass(frozen=True)
class Labels:
    """Labels of proteins.

    Attributes:
        by_name: the labels of each protein, by its identifier.
        name: what the labels are called.
    """

    by_name: Mapping[str, frozenset[str]]
    name: str


def read_labels(path: str | Path, column: str | None = None) -> Labels:
    """Read a table of labels: identifiers in the first column, labels in another one.

    A protein may stand in several rows, and then has several labels. Rows without a label are left out.

    Args:
        path: the table, as `read_cells` reads it.
        column: name of the column with the labels; by default the second one of two.

    Raises:
        FileNotFoundError: where there is no table.
        ValueError: for a table without such columns, without labels, or that does not read.
    """
    cells = read_cells(path)
    place = _label_place(cells.header, column, path)
    found: dict[str, set[str]] = {}
    for row in cells.rows:
        if row[place]:
            found.setdefault(row[0], set()).add(row[place])
    if not found:
        raise ValueError(f"expected labels in {path}, got none")
    return Labels({name: frozenset(labels) for name, labels in found.items()}, cells.header[place])


def _label_place(header: Sequence[str], column: str | None, path: str | Path) -> int:
    """Return the place of the column with the labels."""
    listed = ", ".join(map(repr, header)) or "none"
    if column is None:
        if len(header) != 2:
            raise ValueError(
                f"expected two columns, identifiers and labels, got {listed} in {path}: name that of the "
                "labels with --label-column"
            )
        return 1
    if column not in header[1:]:
        raise ValueError(f"expected a column {column!r} behind the first, got {listed} in {path}")
    return header.index(column)


class LabelTransfer:
    """Gives queries the labels of labelled proteins near them, with a reliability.

    The reliability of a similarity is the share of labelled neighbours as near as this that have a label in
    common, where half of the queries have a relative among the labelled proteins and half have none. It is
    known from up to 2,000 labelled proteins of the index, each compared with its own neighbours by the search
    that serves queries. So it holds for queries that resemble these as they resemble each other.

    Args:
        finder: finds neighbours.
        labels: labels of proteins in the index; others are of no use.
        least: reliability below which nothing counts as near.

    Attributes:
        known: number of proteins in the index that have a label.
        threshold: smallest similarity at which the nearest protein is reliable enough; infinite for none.
        strangers: share of the labelled proteins that would be given a label though none of their own were
            known; so many queries without a relative get one.

    Raises:
        ValueError: for fewer than 20 labelled proteins in the index, labels that all neighbours share, or a
            reliability that is no share.
        ModuleNotFoundError: where scikit-learn is not installed.
    """

    def __init__(self, finder: Finder, labels: Labels, least: float = 0.5) -> None:
        if not 0 <= least <= 1:
            raise ValueError(f"expected a reliability from 0 to 1, got {least}")
        self._finder, self._least = finder, least
        names = finder.index.identifiers
        self._of = {place: labels.by_name[name] for place, name in enumerate(names) if name in labels.by_name}
        self.known = len(self._of)
        unknown = labels.by_name.keys() - set(names)
        if self.known < LEAST_LABELLED:
            raise ValueError(
                f"expected labels of {LEAST_LABELLED} proteins or more of {finder.index.path}, got those of "
                f"{self.known}: it has names such as {finder.index.identifier(0)!r}, and the labels are of "
                f"{min(unknown or labels.by_name)!r}"
            )
        if unknown:
            warnings.warn(
                f"labels of proteins that {finder.index.path} does not have, such as {min(unknown)!r}, left "
                f"out: {len(unknown):,}",
                stacklevel=3,
            )
        self._places = np.fromiter(self._of, np.int64)
        self._reliability = Reliability(self._neighbours(), finder.k)
        self.threshold = self._reliability.threshold(least)
        self.strangers = self._reliability.strangers(self.threshold)

    def _neighbours(self) -> Iterator[list[Pair]]:
        """Yield how similar labelled proteins are to others, nearest first, and which share a label."""
        finder = self._finder
        count = max(finder.candidates, finder.k + 1)
        chosen = self._places[:: -(-self.known // PROTEINS_COMPARED)]
        for places, rows in finder.index.rows(chosen):
            found = finder.near(np.asarray(rows, np.float32), self._places, count)
            for place, near in zip(map(int, places), found, strict=True):
                yield [
                    (float(similarity), bool(self._of[place] & self._of[int(other)]))
                    for other, similarity in zip(near.places, near.similarities, strict=True)
                    if other != place
                ]

    def labels(self, window: Window[str], failures: dict[int, str]) -> Iterator[Transferred]:
        """Find the labels of the queries of a window.

        Args:
            window: records of queries.
            failures: to which the places and reasons of queries that cannot be embedded are added.

        Yields:
            The labels, query by query.
        """
        queries, vectors = self._finder.embed(window, failures)
        for query, near in zip(queries, self.near(vectors), strict=True):
            yield from self.of(window.names[query], near)

    def of(self, query: str, near: Near) -> Iterator[Transferred]:
        """Yield the labels of a query, most reliable first; one without a label where nothing is near.

        Args:
            query: name of the query.
            near: the labelled proteins near it.
        """
        reliabilities = self._reliability.of(near.similarities)
        best: dict[str, Transferred] = {}
        for place, similarity, reliability in zip(near.places, near.similarities, reliabilities, strict=True):
            if reliability < self._least:
                continue
            for label in sorted(self._of[int(place)]):
                first = best.get(label)
                if first is None:
                    name = self._finder.index.identifier(int(place))
                    best[label] = Transferred(query, label, float(reliability), float(similarity), name, 1)
                else:
                    best[label] = first._replace(support=first.support + 1)
        if best:
            yield from sorted(best.values(), key=lambda each: (-each.similarity, -each.support, each.label))
            return
        nearest = self._finder.index.identifier(int(near.places[0])) if len(near.places) else ""
        similarity = float(near.similarities[0]) if len(near.places) else 0.0
        reliability = float(reliabilities[0]) if len(near.places) else 0.0
        yield Transferred(query, "", reliability, similarity, nearest, 0)

    def near(self, vectors: np.ndarray) -> list[Near]:
        """Return the labelled proteins near vectors."""
        return self._finder.near(vectors, self._places)
