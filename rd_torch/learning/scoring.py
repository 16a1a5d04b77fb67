"""Scores of predictions, as sums over groups, so that intervals come from drawing groups anew.

    regression        R^2 = 1 - sum (y - f)^2 / sum (y - mean y)^2
    classification    balanced accuracy: the mean over classes of the share that is predicted right
    multilabel        explained log loss: 1 - loss / loss of predicting each label's own frequency

Each is a function of sums over rows. Groups of similar sequences, not rows, are drawn with replacement,
because rows of one group are no independent evidence.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from rd_torch.choices import LearningTask

DRAWS: Final = 500
"""Number of times that groups are drawn anew, unless there are very many groups."""

MOST_DRAWN: Final = 20_000_000
"""Number of groups times draws at the most; many groups need few draws, and memory holds them all."""

LEAST_DRAWS: Final = 100

LEAST_PROBABILITY: Final = 1e-6
"""Probabilities are held this far from 0 and 1, so that one wrong certainty has a finite loss."""

NAMES: Final[dict[LearningTask, str]] = {
    "regression": "R^2",
    "classification": "balanced accuracy",
    "multilabel": "explained log loss",
}
"""What the score of each task is called."""


class Score(NamedTuple):
    """A score with what it might have been.

    Attributes:
        value: the score; NaN where it is not defined.
        samples: `(draws,)` the scores of groups that are drawn anew; the draws are the same for all scores.
    """

    value: float
    samples: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that has 95 % of the samples."""
        low, high = np.nanquantile(self.samples, [0.025, 0.975])
        return float(low), float(high)


class Judge:
    """Scores the predictions for some rows.

    Args:
        task: what is predicted.
        labels: `(rows,)` numbers or classes, or `(rows, labels)` truth values.
        groups: `(rows,)` number of each row's group, from 0.
    """

    def __init__(self, task: LearningTask, labels: np.ndarray, groups: np.ndarray) -> None:
        self.task, self.labels, self.groups = task, labels, groups
        count = int(groups.max()) + 1
        number = max(LEAST_DRAWS, min(DRAWS, MOST_DRAWN // count))
        generator, shares = np.random.default_rng(0), np.full(count, 1 / count)
        self._draws = np.empty((number, count), np.float32)
        for row in self._draws:
            row[:] = generator.multinomial(count, shares)

    def value(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        """Return the score of predictions.

        Args:
            predictions: `(all rows, outputs)` predictions.
            rows: places of the rows that count.
        """
        return float(self._of_sums(self._terms(predictions, rows).sum(0)[None])[0])

    def score(self, predictions: np.ndarray, rows: np.ndarray) -> Score:
        """Return the score of predictions, with what it might have been.

        Args:
            predictions: `(all rows, outputs)` predictions.
            rows: places of the rows that count.
        """
        terms = self._terms(predictions, rows)
        by_group = np.zeros((self._draws.shape[1], terms.shape[1]))
        np.add.at(by_group, self.groups[rows], terms)
        return Score(float(self._of_sums(terms.sum(0)[None])[0]), self._of_sums(self._draws @ by_group))

    def _terms(self, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return what each row adds to the sums that a score is made of."""
        labels, found = self.labels[rows], predictions[rows]
        if self.task == "regression":
            centred = labels - labels.mean()  # or sums of squares of large numbers would lose digits
            return np.stack([np.ones(len(rows)), centred, centred**2, (labels - found[:, 0]) ** 2], 1)
        if self.task == "classification":
            own = labels[:, None] == np.arange(found.shape[1])
            right = found.argmax(1) == labels
            return np.concatenate([own, own & right[:, None]], 1).astype(float)
        sure = np.clip(found, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        loss = -np.where(labels, np.log(sure), np.log1p(-sure)).sum(1, keepdims=True)
        return np.concatenate([np.ones((len(rows), 1)), labels, loss], 1)

    def _of_sums(self, sums: np.ndarray) -> np.ndarray:
        """Return the score of each row of sums."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.task == "regression":
                count, total, squares, errors = sums.T
                return 1 - errors / (squares - total**2 / count)
            if self.task == "classification":
                there, right = np.split(sums, 2, axis=1)
                shares = np.where(there > 0, right / np.maximum(there, 1), np.nan)
                return np.nanmean(shares, axis=1)
            share = sums[:, 1:-1] / sums[:, :1]
            parts = [np.where(each > 0, each * np.log(each), 0) for each in (share, 1 - share)]
            return 1 + sums[:, -1] / (sums[:, 0] * (parts[0] + parts[1]).sum(1))


def chance(task: LearningTask, outputs: int) -> float:
    """Return the score of predictions that know nothing but frequencies.

    Args:
        task: what is predicted.
        outputs: number of classes.
    """
    return 1 / outputs if task == "classification" else 0.0
