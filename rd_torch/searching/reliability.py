"""`Reliability`: how often neighbours at a similarity have a label in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Pair = tuple[float, bool]
"""The similarity of two labelled proteins, and whether they have a label in common."""


class Reliability:
    """How often neighbours at a similarity have a label in common, as labelled proteins tell.

    Each labelled protein is asked twice: what its nearest neighbour is, and what the nearest would be if no
    protein of its own labels were known. So the answer holds where half of the queries have a relative among
    the labelled proteins, and the others have none and can have no right label.

    Isotonic regression makes curves that never fall: one of nearest neighbours, one of those further away,
    which at the same similarity are right less often.

    Args:
        neighbours: for each of some labelled proteins its labelled neighbours, nearest first.
        count: number of neighbours of each that labels are taken from.

    Raises:
        ValueError: where each protein shares a label with all of its neighbours.
        ModuleNotFoundError: where scikit-learn is not installed.
    """

    def __init__(self, neighbours: Iterable[Sequence[Pair]], count: int) -> None:
        nearest: list[Pair] = []
        further: list[Pair] = []
        strangers: list[Pair] = []
        for pairs in neighbours:
            nearest += pairs[:1]
            further += pairs[1:count]
            strangers += [pair for pair in pairs if not pair[1]][:1]
        if not strangers:
            raise ValueError(
                "expected labels that some neighbours do not have in common, got labels that all share: "
                "these do not tell where a label ends"
            )
        self._nearest = _fit(nearest + strangers)
        self._further = _fit(further + strangers)
        self._strangers = np.array([similarity for similarity, _ in strangers])

    def of(self, similarities: np.ndarray) -> np.ndarray:
        """Return reliabilities of the neighbours of one query.

        Args:
            similarities: those of its neighbours, nearest first.

        Returns:
            A share for each, from 0 to 1.
        """
        if not len(similarities):
            return np.zeros(0)
        further = self._further.predict(similarities[1:]) if len(similarities) > 1 else np.zeros(0)
        # The two curves may cross, and a neighbour that lies further away is never more reliable.
        return np.minimum.accumulate(np.append(self._nearest.predict(similarities[:1]), further))

    def threshold(self, least: float) -> float:
        """Return the smallest similarity at which a nearest neighbour is that reliable, or infinity."""
        places, values = self._nearest.X_thresholds_, self._nearest.y_thresholds_
        first = int(np.searchsorted(values, least))
        if first == len(values):
            return float("inf")
        before = max(0, first - 1)
        return float(np.interp(least, values[before : first + 1], places[before : first + 1]))

    def strangers(self, threshold: float) -> float:
        """Return the share of proteins that would be given a label though none of their own were known."""
        return float((self._strangers >= threshold).mean())


def _fit(pairs: Sequence[Pair]) -> Any:
    """Return the curve from similarities to the share of pairs that have a label in common."""
    try:
        from sklearn.isotonic import IsotonicRegression
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected scikit-learn to tell how reliable labels are, got none: pip install rd_torch[search]"
        ) from error
    # One pair that shares nothing at the largest similarity of all: so few pairs never make a label certain.
    similarities, shared = zip(*pairs, (1.0, False), strict=True)
    return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(similarities, shared)
