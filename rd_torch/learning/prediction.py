"""`Prediction`: what is predicted of a protein or a residue, and its cells in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Prediction(NamedTuple):
    """What is predicted of a protein, or of one of its residues.

    Attributes:
        identifier: identifier of the protein; its number, from 1, where it has none.
        value: the number, the class, or the labels whose probability is one half or more, in a tuple.
        position: position of the residue, from 1; None for a whole protein.
        low: lower end of the interval that had 90 % of held-out labels; None where no number is predicted.
        high: upper end of it.
        right: share of held-out predictions of about this confidence that were right; None where no class is
            predicted.
        probabilities: probability of each class or label, as the head gives it; empty for numbers.
    """

    identifier: str
    value: Any
    position: int | None = None
    low: float | None = None
    high: float | None = None
    right: float | None = None
    probabilities: Mapping[str, float] = {}
