"""Nested cross-validation: the score at every width, and the narrowest width that is not worse.

Rows lie in folds. A head that is fitted without fold `o` chooses its setting, and its width, by heads that
were fitted without `o` and another fold `i`, which predict the rows of `i`. So what is predicted in fold `o`
has seen none of its labels, not even by a choice, and the scores of all widths are honest, as is that of the
whole procedure with its choice of width. Heads without `o` and `i` serve both, so that five folds take
fifteen fits of each width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rd_torch.choices import HeadName, LearningTask
from rd_torch.learning.estimators import SETTINGS, FittedHead, fit_heads
from rd_torch.learning.scoring import Judge, Score

LEAST_FOLDS = 3
"""Number of folds that nested cross-validation needs: one is predicted, one chooses, one teaches."""


@dataclass(frozen=True)
class Rows:
    """What heads are fitted to.

    Attributes:
        task: what is predicted.
        labels: `(rows,)` numbers or classes, or `(rows, labels)` truth values.
        outputs: number of classes or labels; 1 for numbers.
        groups: `(rows,)` number of each row's group of similar sequences.
        cut: function that gives the `(rows, features)` of a width.
    """

    task: LearningTask
    labels: np.ndarray
    outputs: int
    groups: np.ndarray
    cut: Callable[[int], np.ndarray]


@dataclass(frozen=True)
class AtWidth:
    """What was found at one width.

    Attributes:
        width: number of features, for each way to pool.
        setting: place of the setting that cross-validation over all folds chooses.
        score: score of predictions by heads whose settings were chosen without the predicted fold.
        predictions: `(rows, outputs)` these predictions.
    """

    width: int
    setting: int
    score: Score
    predictions: np.ndarray


@dataclass(frozen=True)
class Found:
    """What nested cross-validation has found.

    Attributes:
        widths: what was found at each width, narrowest first.
        chosen: place of the chosen width.
        score: score of the whole procedure, which chooses setting and width without the predicted fold.
        predictions: `(rows, outputs)` predictions of the whole procedure.
    """

    widths: Sequence[AtWidth]
    chosen: int
    score: Score
    predictions: np.ndarray


def select(rows: Rows, folds: np.ndarray, kind: HeadName, widths: Sequence[int]) -> Found:
    """Choose a head's setting at every width, and the width, by nested cross-validation.

    Args:
        rows: what heads are fitted to.
        folds: `(rows,)` number of each row's fold, from 0; three folds or more.
        kind: which head.
        widths: the widths to choose from, narrowest first.

    Returns:
        What was found.

    Raises:
        ValueError: for fewer than three folds.
    """
    count = int(folds.max()) + 1
    if count < LEAST_FOLDS:
        raise ValueError(f"expected {LEAST_FOLDS} folds or more, got {count}")
    judge = Judge(rows.task, rows.labels, rows.groups)
    parts = [_cross_predict(rows, folds, kind, width) for width in widths]
    everywhere = np.arange(len(folds))
    kept = [_Choice.of(part, judge, everywhere, folds) for part in parts]
    scores = [judge.score(each.predictions, everywhere) for each in kept]
    whole = np.empty_like(kept[0].predictions)
    for held in range(count):
        inner = [_inner(part, judge, folds, held) for part in parts]
        place = narrowest(inner)
        own = folds == held
        whole[own] = kept[place].predictions[own]
    found = [
        AtWidth(width, each.setting, score, each.predictions)
        for width, each, score in zip(widths, kept, scores, strict=True)
    ]
    return Found(found, narrowest(scores), judge.score(whole, everywhere), whole)


def narrowest(scores: Sequence[Score]) -> int:
    """Return the place of the narrowest width that is not worse than the best one.

    It is not worse where it scores less by at most one standard error of that difference, over draws of
    groups (the one-standard-error rule; Breiman et al., Classification and Regression Trees, 1984).

    Args:
        scores: scores of the widths, narrowest first.
    """
    best = max(scores, key=lambda score: score.value)
    for place, score in enumerate(scores):
        if best.value - score.value <= np.nanstd(best.samples - score.samples):
            return place
    return scores.index(best)


@dataclass(frozen=True)
class _Predictions:
    """Predictions for rows of folds that the heads have not seen.

    Attributes:
        single: `(settings, rows, outputs)`, by heads without the row's fold.
        pairs: by another fold, the same by heads without that fold and the row's.
    """

    single: np.ndarray
    pairs: Mapping[int, np.ndarray]


def _cross_predict(rows: Rows, folds: np.ndarray, kind: HeadName, width: int) -> _Predictions:
    """Predict every row by heads without its fold, and by heads without its fold and another."""
    features, count = rows.cut(width), int(folds.max()) + 1
    shape = (len(SETTINGS[kind]), len(folds), rows.outputs)
    single = np.full(shape, np.nan)
    pairs = {fold: np.full(shape, np.nan) for fold in range(count)}
    for left_out in [*combinations(range(count), 1), *combinations(range(count), 2)]:
        known = ~np.isin(folds, left_out)
        heads = fit_heads(kind, rows.task, features[known], rows.labels[known], rows.outputs)
        for place, fold in enumerate(left_out):
            own = folds == fold
            target = single if len(left_out) == 1 else pairs[left_out[1 - place]]
            for setting, head in enumerate(heads):
                target[setting, own] = head(features[own])
    return _Predictions(single, pairs)


def _inner(part: _Predictions, judge: Judge, folds: np.ndarray, held: int) -> Score:
    """Return the score of a width, with its best setting, on all folds but one that takes no part."""
    rest = np.flatnonzero(folds != held)
    predictions = part.pairs[held]
    setting = _best_setting(predictions, judge, rest)
    return judge.score(predictions[setting], rest)


@dataclass(frozen=True)
class _Choice:
    """The setting that all folds choose, and predictions whose settings were chosen without their fold."""

    setting: int
    predictions: np.ndarray

    @classmethod
    def of(cls, part: _Predictions, judge: Judge, rows: np.ndarray, folds: np.ndarray) -> _Choice:
        """Choose the settings of a width."""
        predictions = np.empty(part.single.shape[1:])
        for held, inner in part.pairs.items():
            setting = _best_setting(inner, judge, np.flatnonzero(folds != held))
            own = folds == held
            predictions[own] = part.single[setting, own]
        return cls(_best_setting(part.single, judge, rows), predictions)


def _best_setting(predictions: np.ndarray, judge: Judge, rows: np.ndarray) -> int:
    """Return the place of the setting of the best score."""
    return int(np.nanargmax([judge.value(each, rows) for each in predictions]))


def fit_final(rows: Rows, kind: HeadName, at: AtWidth) -> FittedHead:
    """Fit the head of a width, with its setting, to all rows.

    Args:
        rows: what heads are fitted to.
        kind: which head.
        at: the width and the setting.

    Returns:
        The head.
    """
    heads = fit_heads(kind, rows.task, rows.cut(at.width), rows.labels, rows.outputs)
    return heads[at.setting]
