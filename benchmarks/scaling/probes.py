"""The heads: ridge, logistic regression, a small MLP and neighbours, all taught by training rows alone.

    linear    Numbers are predicted by ridge; generalised cross-validation (Golub, Heath and Wahba 1979)
              chooses the penalty. Classes are predicted by multinomial logistic regression with a penalty
              of 1/2 on the squared weights.
    nearest   The mean of the labels of the ten rows of largest cosine, of features as they are. No other
              head sees scales.
    MLP       One hidden layer of 64 GELUs is trained by AdamW and stopped early by the last fifth of the
              training rows. Residues stand protein by protein, so these are of other proteins.

For all but the neighbours, features are standardised by the training rows' means and deviations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from benchmarks.finetuning.melting_temperature import rank_correlation
from benchmarks.finetuning.secondary_structure import scores as class_scores
from rd_torch.heads import Head, Task

PENALTIES = tuple(10 ** (quarter / 4) for quarter in range(-12, 29))
"""Penalties from a thousandth to ten million, four a decade, for standardised features."""

ABSENT = 1e-12
"""Directions with at most this share of the largest one's squares count as absent."""

CONSTANT = 1e-9
"""Features whose deviation is at most this share of their mean's size count as constant: rounding."""

HIDDEN, RATE, DECAY, BATCH, EPOCHS, PATIENCE = 64, 1e-3, 0.01, 256, 200, 20
NEIGHBOURS = 10
LINEAR, MLP, NEAREST = "linear", "MLP", "nearest"
Scores = dict[str, float]


class Rows(NamedTuple):
    """Examples: `(rows, width)` features, and `(rows,)` labels, numbers or classes."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Ridge:
    """A linear prediction.

    Attributes:
        weights: `(width,)`.
        intercept: `()`, free of any penalty.
        alpha: Penalty that was chosen.
    """

    weights: Tensor
    intercept: float
    alpha: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return `(rows,)` predictions."""
        return features @ self.weights + self.intercept


class Squares(NamedTuple):
    """Centred features in the coordinates of their principal directions, as ridge regression needs them.

    Attributes:
        squares: `(n,)` sums of squares along the directions.
        V: `(width, n)` directions.
        cross: `(n, targets)` products of these coordinates with the centred targets.
        total: Sum of squares of the centred targets.
        rows: Number of rows.
    """

    squares: Tensor
    V: Tensor
    cross: Tensor
    total: Tensor
    rows: int

    @classmethod
    def of(cls, X: Tensor, Y: Tensor) -> Squares:
        """Decompose centred `(rows, width)` features beside centred `(rows, targets)` targets."""
        if len(X) >= X.shape[1]:
            squares, V = torch.linalg.eigh(X.T @ X)
            there = squares > ABSENT * squares[-1]
            squares, V = squares[there], V[:, there]
        else:
            squares, U = torch.linalg.eigh(X @ X.T)
            there = squares > ABSENT * squares[-1]
            squares = squares[there]
            V = X.T @ U[:, there] / squares.sqrt()
        return cls(squares, V, V.T @ (X.T @ Y), Y.square().sum(), len(X))

    def errors(self, alphas: Tensor) -> Tensor:
        """Return the generalised cross-validation error of each penalty, summed over targets.

        It is `n RSS / (n - 1 - d)^2`, with d the effective degrees of freedom and 1 for the intercept.

        Args:
            alphas: `(penalties, 1)`.
        """
        shrunk = self.squares + alphas
        explained = (self.cross.square().sum(1) * (self.squares + 2 * alphas) / shrunk.square()).sum(1)
        freedom = self.rows - 1 - (self.squares / shrunk).sum(1)
        errors = self.rows * (self.total - explained) / freedom.square()
        return torch.where(freedom > 0, errors, math.inf)


def fit_ridge(features: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Fit ridge regression with the penalty of least generalised cross-validation error.

    Nothing but these rows is seen.

    Args:
        features: `(n, width)`.
        labels: `(n,)`.
        penalties: Penalties to choose from; 0 gives the least-squares solution of minimum norm.
    """
    mean, centre = features.mean(0), labels.mean()
    found = Squares.of(features - mean, (labels - centre)[:, None])
    alphas = torch.tensor(penalties, dtype=features.dtype, device=features.device)[:, None]
    alpha = float(alphas[found.errors(alphas).argmin()])
    weights = found.V @ (found.cross[:, 0] / (found.squares + alpha))
    return Ridge(weights, float(centre - mean @ weights), alpha)


def expected_error(taught: Rows, classes: int) -> float:
    """Return the least generalised cross-validation error of ridge regression on rows that teach.

    Layers are chosen by it. Nothing but these rows is seen. Classes are columns of zeros and ones.

    Args:
        taught: Features and labels.
        classes: Number of classes; 0 where labels are numbers.
    """
    features, _ = standardise(taught.features, taught.features[:0])
    labels = functional.one_hot(taught.labels, classes) if classes else taught.labels[:, None]
    targets = labels.to(features.dtype)
    found = Squares.of(features, targets - targets.mean(0))
    alphas = torch.tensor(PENALTIES, dtype=features.dtype, device=features.device)[:, None]
    return float(found.errors(alphas).min())


def linear(known: Tensor, labels: Tensor, unknown: Tensor, classes: int, seed: int) -> tuple[Tensor, Scores]:
    """Return predictions of ridge or logistic regression for unknown rows, and the penalty of ridge."""
    del seed  # nothing is drawn
    if not classes:
        ridge = fit_ridge(known, labels.to(known.dtype))
        return ridge(unknown), {"alpha": ridge.alpha}
    model = LogisticRegression(max_iter=1_000).fit(known.float().cpu().numpy(), labels.cpu().numpy())
    shares = torch.zeros(len(unknown), classes)
    found = model.predict_proba(unknown.float().cpu().numpy())
    shares[:, model.classes_] = torch.from_numpy(found).float()
    return shares, {}


def small_mlp(
    known: Tensor, labels: Tensor, unknown: Tensor, classes: int, seed: int
) -> tuple[Tensor, Scores]:
    """Return predictions of the MLP for unknown rows, and the epoch that it was best at."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task: Task = "classification" if classes else "regression"
        head = Head(known.shape[1], classes or 1, task=task, hidden=HIDDEN).to(known.device)
        centre, scale = (0, 1) if classes else (labels.mean(), labels.std().clamp(min=1e-12))
        targets = labels if classes else ((labels - centre) / scale).float()
        features, most = known.float(), len(known) * 4 // 5
        taught = Rows(features[:most], targets[:most])
        best = _train(head, taught, Rows(features[most:], targets[most:]))
    with torch.no_grad():
        predictions = head.predict(unknown.float())
    return predictions.softmax(1) if classes else predictions[:, 0] * scale + centre, {"epochs": best}


def _train(head: Head, taught: Rows, held: Rows) -> int:
    """Train until the held rows' loss has not fallen for `PATIENCE` epochs.

    The head ends as it was at its best; that epoch is returned.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    lowest, best, kept = math.inf, 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(taught.labels)).to(taught.labels.device).split(BATCH):
            optimizer.zero_grad()
            _loss(head.predict(taught.features[batch]), taught.labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(_loss(head.predict(held.features), held.labels))
        if loss < lowest:
            lowest, best, kept = loss, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best >= PATIENCE:
            break
    head.load_state_dict(kept)
    return best


def _loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of numbers, or the cross-entropy of classes."""
    if targets.is_floating_point():
        return functional.mse_loss(predictions[:, 0], targets)
    return functional.cross_entropy(predictions, targets)


def nearest(known: Tensor, labels: Tensor, unknown: Tensor, classes: int, seed: int) -> tuple[Tensor, Scores]:
    """Return the mean label of the nearest known rows, or their shares of the classes, for unknown rows."""
    del seed  # nothing is drawn
    targets = functional.one_hot(labels, classes).to(known.dtype) if classes else labels.to(known.dtype)
    cosines = functional.normalize(unknown, dim=1) @ functional.normalize(known, dim=1).T
    return targets[cosines.topk(min(NEIGHBOURS, len(known)), dim=1).indices].mean(1), {}


HEADS: Mapping[str, Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Scores]]] = {
    LINEAR: linear,
    MLP: small_mlp,
    NEAREST: nearest,
}


def standardise(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, each feature less the known rows' mean, over their deviation.

    Features that are constant over the known rows become zeros.
    """
    mean, deviation = known.mean(0), known.std(0)
    deviation[deviation <= CONSTANT * mean.abs()] = math.inf
    return (known - mean) / deviation, (unknown - mean) / deviation


def judge(head: str, taught: Rows, judged: Rows, classes: int, seed: int) -> Scores:
    """Return the scores of a head on the rows that judge.

    Args:
        head: Name of a head of `HEADS`.
        taught: What the head learns from; it sees no other labels.
        judged: What it is judged by.
        classes: Number of classes; 0 where labels are numbers.
        seed: Seed of the MLP's weights and batches.

    Returns:
        `"Spearman"` for numbers, `"accuracy"` and `"macro AUPR"` for classes, with the penalty of ridge
        and the epochs of the MLP.
    """
    known, unknown = taught.features, judged.features
    if head != NEAREST:
        known, unknown = standardise(known, unknown)
    predictions, facts = HEADS[head](known, taught.labels, unknown, classes, seed)
    return {**_scores(predictions.cpu(), judged.labels.cpu(), classes), **facts}


def _scores(predictions: Tensor, labels: Tensor, classes: int) -> Scores:
    """Return what predictions are worth."""
    if classes:
        return class_scores(predictions.numpy(), labels.numpy())
    return {"Spearman": rank_correlation(predictions, labels)}
