"""Choose layers by labels: the layer whose nested embedding predicts them best, by cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Unpack

import numpy as np
from torch import Tensor

from rd_torch.choosing import Score, solve_first
from rd_torch.maps import Maps
from rd_torch.modules import modules_of
from rd_torch.moments import RunningMoments
from rd_torch.reading import Proteins
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions
from rd_torch.stage import nest

FOLDS: Final = 5
"""Number of parts into which labelled sequences are cut; each part is predicted from the others."""

PENALTIES: Final = np.logspace(-3, 7, 21)
"""Penalties of ridge regression, for standardised features, among which it chooses by itself."""


class Labelled(NamedTuple):
    """Sequences with what is to be predicted of them.

    Attributes:
        sequences: amino-acid letters.
        labels: a number for each sequence, or a class, which is text.
        name: what the record of a fit calls them.

    Examples:
        >>> rd_torch.Labelled(["MKTAYIAKQR", "MQIFVKTLTG"], [48.5, 71.0], "melting temperatures").name
        'melting temperatures'
    """

    sequences: Sequence[str]
    labels: Sequence[float] | Sequence[str]
    name: str = ""


def read_labelled(path: str | Path, label: str, sequence_column: str | None = None) -> Labelled:
    """Read a table of sequences with labels.

    Args:
        path: the table, in any form that `Proteins` reads.
        label: name of the column with the labels: numbers, or else names of classes.
        sequence_column: name of the column with the sequences; by default the only one that can be meant.

    Raises:
        FileNotFoundError: where there is no table.
        ValueError: for a table without such columns, and a row without a sequence or a label.
    """
    rows = list(Proteins(path, sequence_column=sequence_column, identifier_column=label))
    texts = [row.identifier for row in rows]
    try:
        labels: list[float] | list[str] = [float(text) for text in texts]
    except ValueError:
        labels = texts
    return Labelled([row.sequence for row in rows], labels, f"{label} of {Path(path).name}")


def require_labelled(labelled: Labelled | None) -> Labelled:
    """Require labels by which layers can be chosen.

    Args:
        labelled: sequences and labels.

    Raises:
        ValueError: for no labels, another number of labels than of sequences, numbers that are not finite or
            all equal, and fewer than ten rows, or than two classes of five rows each.
        ModuleNotFoundError: where scikit-learn is not installed.
    """
    if labelled is None:
        raise ValueError("expected labelled sequences to choose layers by labels, got none: give `labelled`")
    require_sklearn("to choose layers by labels")
    labels = np.asarray(labelled.labels)
    if len(labels) != len(labelled.sequences) or len(labels) < 2 * FOLDS:
        raise ValueError(
            f"expected a label for each of {2 * FOLDS} sequences or more, got {len(labels):,} labels for "
            f"{len(labelled.sequences):,} sequences"
        )
    kinds, counts = np.unique(labels, return_counts=True)
    if _are_numbers(labels):
        if not np.isfinite(labels).all() or len(kinds) < 2:
            raise ValueError("expected finite labels that differ, got equal ones, NaN or infinity")
    elif len(kinds) < 2 or counts.min() < FOLDS:
        listed = ", ".join(f"{count:,} of {kind}" for kind, count in zip(kinds[:5], counts[:5], strict=True))
        raise ValueError(f"expected two classes or more, each of {FOLDS} sequences or more, got {listed}")
    return labelled


def require_sklearn(purpose: str) -> None:
    """Require scikit-learn.

    Args:
        purpose: what it is needed for, in words that begin with "to".

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    try:
        import sklearn  # noqa: F401  # to see whether it is there
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected scikit-learn {purpose}, got none: pip install rd_torch[learn]"
        ) from error


def by_labels(
    raw: Mapping[str, Tensor],
    labels: Sequence[float] | Sequence[str],
    moments: RunningMoments,
    widths: Mapping[str, int],
    **options: Unpack[SolveOptions],
) -> Score:
    """Return the score of a chain by labels.

    It is the cross-validated R^2 of ridge regression on the nested embedding, or, for classes, the balanced
    accuracy of logistic regression. No label is seen that is predicted.

    Args:
        raw: `(sequences, width)` mean raw embeddings by candidate.
        labels: a label for each sequence.
        moments: joint moments of all candidates.
        widths: width of each candidate, by its name.
        **options: options of `solve_stages`.
    """
    predict_from = options.get("predict_from", SOLVE_DEFAULTS["predict_from"])

    def score(levels: Sequence[str]) -> float:
        """Return what the chain is worth."""
        if len(levels) == 1:
            return cross_validated(raw[levels[0]].numpy(), np.asarray(labels))
        stages = solve_first(moments, widths, levels, **options)
        by_level: dict[str, Maps] = dict(zip(levels[1:], stages, strict=True))
        nested = nest({level: raw[level] for level in levels}, modules_of(by_level), predict_from)
        return cross_validated(nested[levels[-1]].numpy(), np.asarray(labels))

    return score


def cross_validated(features: np.ndarray, labels: np.ndarray) -> float:
    """Return how well a linear head predicts labels that it has not seen.

    Args:
        features: `(rows, width)`; each is standardised.
        labels: `(rows,)` numbers or classes.
    """
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = {"n_splits": FOLDS, "shuffle": True, "random_state": 0}
    if _are_numbers(labels):
        head, folds, scoring = RidgeCV(PENALTIES), KFold(**order), "r2"
    else:
        head, folds, scoring = (
            LogisticRegression(max_iter=1_000),
            StratifiedKFold(**order),
            "balanced_accuracy",
        )
    pipeline = make_pipeline(StandardScaler(), head)
    return float(cross_val_score(pipeline, features, labels, cv=folds, scoring=scoring).mean())


def _are_numbers(labels: np.ndarray) -> bool:
    return bool(np.issubdtype(labels.dtype, np.number))
