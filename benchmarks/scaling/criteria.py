"""Choices of layers: by criteria that need no labels, and by the error on labels of training rows.

A criterion goes from the smallest backbone to the largest and takes of each the layer that is best beside the
layers that were taken before. All it sees are the joint moments of natural proteins, so one choice serves
every question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from benchmarks.scaling.layers import Widths, layers_by_level, number_of
from benchmarks.scaling.maps import NESTED, PLAIN, Solver
from rd_torch import RunningMoments

Chosen = tuple[str, ...]
Worth = Callable[[Solver, Chosen], float]
"""What the last layer of a chain is worth beside those before it."""

Criterion = Callable[[RunningMoments, Widths], Sequence[str]]
"""What chooses a layer of each backbone, smallest backbone first, from joint moments of all layers."""


def choose_greedily(layers: Widths | Sequence[str], worth: Callable[[Chosen], float]) -> Chosen:
    """Take of each backbone the layer of largest worth, after the layers that were taken before.

    Of equal layers the deepest is taken.
    """
    chosen: Chosen = ()
    for candidates in layers_by_level(layers).values():
        chosen = max(((*chosen, layer) for layer in reversed(candidates)), key=worth)
    return chosen


def choose_apart(layers: Widths | Sequence[str], worth: Callable[[Chosen], float]) -> Chosen:
    """Take of each backbone the layer that alone is of largest worth; of equal ones the deepest."""
    return tuple(
        max(reversed(candidates), key=lambda layer: worth((layer,)))
        for candidates in layers_by_level(layers).values()
    )


def at_depth(share: float) -> Criterion:
    """Return the criterion that takes of each backbone the layer nearest to a share of its depth."""

    def choose(moments: RunningMoments, widths: Widths) -> Chosen:
        """Choose by numbers of layers alone."""
        del moments
        return tuple(
            min(reversed(names), key=lambda layer: abs(number_of(layer) - share * number_of(names[-1])))
            for names in layers_by_level(widths).values()
        )

    return choose


def entropy_rank(covariance: Tensor) -> float:
    """Return the exponential of the entropy of a covariance's eigenvalues, as shares of their sum."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def participation(covariance: Tensor) -> float:
    """Return the participation ratio of a covariance's eigenvalues, `(sum)^2 / sum of squares`."""
    return float(covariance.trace().square() / covariance.square().sum())


def block_of(solver: Solver, layer: str) -> Tensor:
    """Return the covariance of a layer's raw embedding."""
    columns = solver.columns([layer])
    return solver.covariance[columns[:, None], columns]


def residual_of(solver: Solver, chosen: Chosen) -> Tensor:
    """Return the covariance of what the last layer has beyond the layers before, by least squares.

    Of the first layer this is its covariance: nothing stands before it.
    """
    *before, last = chosen
    own = block_of(solver, last)
    if not before:
        return own
    known, columns = solver.columns(before), solver.columns([last])
    cross = solver.covariance[known[:, None], columns]
    inside = solver.covariance[known[:, None], known]
    return own - cross.T @ torch.linalg.pinv(inside, hermitian=True, rtol=1e-12) @ cross


def explained_of(solver: Solver, chosen: Chosen) -> tuple[float, float]:
    """Return the shares of the last layer's variance that the step predicts, and that its directions add."""
    found = solver.stages(solver.recipe(NESTED, chosen))[-1].explained
    if found is None or found.r2 is None:
        raise ValueError("expected stages that know what they explain, got others")
    return found.r2, (1 - found.r2) * found.kept


def share_of_everything(solver: Solver, chosen: Chosen) -> float:
    """Return the share of all layers' variance that a nested embedding explains; each layer counts alike."""
    kind = NESTED if len(chosen) > 1 else PLAIN
    columns, matrix, _ = solver.map_of(solver.recipe(kind, chosen))
    cross = matrix.T @ solver.covariance[columns]
    inverse = torch.linalg.pinv(cross[:, columns] @ matrix, hermitian=True, rtol=1e-12)
    explained = torch.einsum("ik,ij,jk->k", cross, inverse, cross)
    shares = [
        explained[solver.columns([layer])].sum() / block_of(solver, layer).trace() for layer in solver.widths
    ]
    return float(torch.stack(shares).mean())


def rank_of(solver: Solver, chosen: Chosen) -> float:
    """Return the effective rank of the last layer."""
    return entropy_rank(block_of(solver, chosen[-1]))


def behind_rank(worth: Worth) -> Worth:
    """Return a worth of steps; the first layer, to which no step leads, goes by its effective rank."""
    return lambda solver, chosen: (worth if len(chosen) > 1 else rank_of)(solver, chosen)


def _greedy(worth: Worth) -> Criterion:
    """Return the criterion that goes by a worth."""

    def choose(moments: RunningMoments, widths: Widths) -> Chosen:
        """Choose greedily, with every chain solved once."""
        solver = Solver(moments, widths)
        return choose_greedily(widths, lambda chosen: worth(solver, chosen))

    return choose


CRITERIA: Final[Mapping[str, Criterion]] = {
    "two thirds of the depth": at_depth(2 / 3),
    "half of the depth": at_depth(1 / 2),
    "most predicted": _greedy(behind_rank(lambda solver, chosen: explained_of(solver, chosen)[0])),
    "least predicted": _greedy(behind_rank(lambda solver, chosen: -explained_of(solver, chosen)[0])),
    "most added": _greedy(behind_rank(lambda solver, chosen: explained_of(solver, chosen)[1])),
    "most predicted and added": _greedy(
        behind_rank(lambda solver, chosen: sum(explained_of(solver, chosen)))
    ),
    "most of all layers": _greedy(share_of_everything),
    "effective rank, layer": _greedy(rank_of),
    "effective rank, residual": _greedy(lambda solver, chosen: entropy_rank(residual_of(solver, chosen))),
    "participation ratio, layer": _greedy(lambda solver, chosen: participation(block_of(solver, chosen[-1]))),
    "participation ratio, residual": _greedy(
        lambda solver, chosen: participation(residual_of(solver, chosen))
    ),
}
"""Criteria that need no labels."""
