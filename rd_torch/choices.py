"""Choices that users have by name, each listed once for whoever offers, checks or documents them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

Regressor: TypeAlias = Literal["pcr", "ols", "ridge"]
PredictFrom: TypeAlias = Literal["nested", "previous"]
Scale: TypeAlias = Literal["none", "feature", "block"]
SpecialRows: TypeAlias = Literal["maps", "larger"]
Criterion: TypeAlias = Literal["rank", "added", "labels"]
Method: TypeAlias = Literal["rd", "naive"]
LearningTask: TypeAlias = Literal["regression", "classification", "multilabel"]
HeadName: TypeAlias = Literal["ridge", "logistic", "mlp", "knn", "gp"]
Storage: TypeAlias = Literal["included", "referenced"]
Scoring: TypeAlias = Literal["wild-type", "masked", "masked-jointly", "pseudo-likelihood"]

FloatType: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""The types of number that backbones compute in and stores hold, as PyTorch names them."""

# The choices among the maps that the authors published.
PublishedRegressor: TypeAlias = Literal["pcr", "linear", "ridge"]
PCA: TypeAlias = Literal["incremental", "fbpca"]
SequenceCount: TypeAlias = Literal["0.5k", "1k", "5k", "10k"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require that an option called `name` has one of the values in `choices`.

    Raises:
        ValueError: for any other value, with the choices.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected {name} to be one of {listed}, got {value!r}")


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Require that all options are known by name, as Python requires of named arguments.

    Raises:
        TypeError: for any other option, with the known ones.
    """
    known = list(known)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"expected options among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
