"""`measure_recall`: how many of the nearest proteins by all features the first stage hands on."""

from __future__ import annotations

from typing import Final

import numpy as np

from rd_torch.searching.index import Index, to_units

ASKED: Final = 200
"""Number of indexed proteins, evenly spread, by which recall is measured."""

NEAREST: Final = 10
"""Number of nearest proteins of each that count."""

CANDIDATES: Final = 300
"""Number of proteins that the first stage hands on unless another one is asked for."""


def measure_recall(index: Index) -> float:
    """Measure how many of the nearest proteins by all features are among the candidates of the first stage.

    Args:
        index: the index, all vectors of whose stores are read once.

    Returns:
        The share, from 0 to 1, of the ten nearest others of each of up to 200 indexed proteins.
    """
    asked = np.unique(np.linspace(0, len(index) - 1, ASKED).astype(int))
    vectors = np.concatenate([rows for _, rows in index.rows(asked)])
    units, count = to_units(vectors, index.mean), min(NEAREST, len(index) - 1)
    best, nearest = np.zeros((len(asked), 0)), np.zeros((len(asked), 0), int)
    for places, rows in index.rows(range(len(index))):
        similarities = units @ to_units(rows, index.mean).T
        similarities[asked[:, None] == places] = -np.inf  # none is a neighbour of its own
        best = np.hstack([best, similarities])
        nearest = np.hstack([nearest, np.broadcast_to(places, similarities.shape)])
        order = np.argpartition(-best, count - 1, axis=1)[:, :count]
        best, nearest = np.take_along_axis(best, order, 1), np.take_along_axis(nearest, order, 1)
    _, handed = index.first(vectors[:, : index.config.first_width], CANDIDATES + 1)
    shares = [np.isin(mine, found).mean() for mine, found in zip(nearest, handed, strict=True)]
    return float(np.mean(shares))
