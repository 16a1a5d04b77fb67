"""What a search finds: `Hit`, `Transferred`, and their columns in a table."""

from __future__ import annotations

from typing import Final, NamedTuple


class Hit(NamedTuple):
    """A protein that a search found.

    Attributes:
        query: name of the query.
        target: name of the protein that was found.
        rank: its rank among those of this query, from 1.
        similarity: cosine similarity by all features, -1 to 1; by the first ones where these alone are asked.
        first_similarity: cosine similarity by the first features.
        query_length: number of residues of the query.
        target_length: number of residues of the protein that was found; 0 where the store does not know.
    """

    query: str
    target: str
    rank: int
    similarity: float
    first_similarity: float
    query_length: int
    target_length: int


class Transferred(NamedTuple):
    """A label that a query takes from a protein near it.

    Attributes:
        query: name of the query.
        label: the label; empty where nothing is near enough.
        reliability: share of labelled neighbours as near as this that have a label in common.
        similarity: cosine similarity to the nearest protein with this label.
        target: name of that protein.
        support: number of neighbours that have the label.
    """

    query: str
    label: str
    reliability: float
    similarity: float
    target: str
    support: int


COLUMNS: Final = Hit._fields
USUAL: Final = ("query", "target", "rank", "similarity", "first_similarity")
"""Columns of a table of hits unless others are asked for."""


def columns_of(text: str | None) -> tuple[str, ...]:
    """Return the columns that a text such as `"query,target,similarity"` names.

    Raises:
        ValueError: for a column that does not exist or comes twice.
    """
    if text is None:
        return USUAL
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            raise ValueError(
                f"expected columns among {', '.join(COLUMNS)}, each once, got {name!r} in {text!r}"
            )
    return names
