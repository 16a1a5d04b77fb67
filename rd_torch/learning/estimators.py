"""The heads: how each is fitted to features, and how it predicts from tensors alone.

scikit-learn fits logistic regression, MLPs and Gaussian processes. What it has found is kept as arrays, and
predictions are made from these by a few lines of our own, so that a saved head needs no pickle and gives
the same numbers after loading.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rd_torch.choices import HeadName, LearningTask
from rd_torch.labelled import PENALTIES

CONSTANT: Final = 1e-9
"""Features whose deviation is at most this share of their mean's size are constant, and become zeros."""

ABSENT: Final = 1e-12
"""Directions with at most this share of the largest one's squares count as absent."""

LEAST_FOR_STOPPING: Final = 50
"""Number of rows from which on a tenth of them stops the training of a network."""

MOST_FOR_PROCESS: Final = 1_000
"""Number of rows to which a Gaussian process is fitted at the most; its time grows with their cube."""

SETTINGS: Final[Mapping[HeadName, tuple[float, ...]]] = {
    "ridge": tuple(PENALTIES),
    "logistic": (0.01, 0.1, 1, 10, 100, 1_000),
    "mlp": (0.01, 1),
    "knn": (1, 3, 5, 10, 20, 50),
    "gp": (0,),
}
"""What cross-validation chooses among for each head: a penalty, or a number of neighbours."""

SETTING_NAMES: Final[Mapping[HeadName, str]] = {
    "ridge": "penalty",
    "logistic": "penalty",
    "mlp": "penalty",
    "knn": "neighbours",
    "gp": "",
}

HEADS_OF: Final[Mapping[LearningTask, tuple[HeadName, ...]]] = {
    "regression": ("ridge", "mlp", "knn", "gp"),
    "classification": ("logistic", "mlp", "knn"),
    "multilabel": ("logistic", "mlp", "knn"),
}
"""The heads of each task, the default first."""


@dataclass(frozen=True)
class FittedHead:
    """A head that has been fitted.

    Attributes:
        kind: which head it is.
        task: what it predicts.
        tensors: its numbers, by name.
    """

    kind: HeadName
    task: LearningTask
    tensors: Mapping[str, np.ndarray]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predict.

        Args:
            features: `(rows, width)`.

        Returns:
            `(rows, 1)` numbers, or `(rows, classes)` probabilities.
        """
        scaled = (features - self.tensors["mean"]) * self.tensors["factor"]
        return _PREDICTING[self.kind](scaled, self.tensors, self.task)


def fit_heads(
    kind: HeadName, task: LearningTask, features: np.ndarray, labels: np.ndarray, outputs: int
) -> list[FittedHead]:
    """Fit a head with each of its settings. Nothing but these rows is seen.

    Args:
        kind: which head.
        task: what to predict.
        features: `(rows, width)`; each is standardised by these rows.
        labels: `(rows,)` numbers or classes, or `(rows, labels)` truth values.
        outputs: number of classes or labels; 1 for numbers.

    Returns:
        A head for each of `SETTINGS[kind]`.

    Raises:
        ValueError: for a class that no row has, and for too many rows for a Gaussian process.
    """
    if task == "classification" and len(np.unique(labels)) < outputs:
        raise ValueError(
            f"expected each of {outputs} classes among the labels that teach, got {len(np.unique(labels))}: "
            "leave rare classes out"
        )
    exact = np.asarray(features, np.float64)
    mean, deviation = exact.mean(0), exact.std(0)
    varies = deviation > CONSTANT * np.abs(mean)
    factor = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    scaled = (exact - mean) * factor
    common = {"mean": mean, "factor": factor}
    return [
        FittedHead(kind, task, common | tensors) for tensors in _FITTING[kind](scaled, labels, task, outputs)
    ]


def _fit_ridge(X: np.ndarray, y: np.ndarray, task: LearningTask, outputs: int) -> list[dict[str, np.ndarray]]:
    """Fit ridge regression with every penalty, by one decomposition."""
    centre = y.mean()
    if len(X) >= X.shape[1]:
        squares, V = np.linalg.eigh(X.T @ X)
        there = squares > ABSENT * squares[-1]
        squares, V = squares[there], V[:, there]
    else:
        squares, U = np.linalg.eigh(X @ X.T)
        there = squares > ABSENT * squares[-1]
        squares = squares[there]
        V = X.T @ U[:, there] / np.sqrt(squares)
    cross = V.T @ (X.T @ (y - centre))
    intercept = np.array([centre])
    return [
        {"weights": (V @ (cross / (squares + penalty)))[:, None], "intercept": intercept}
        for penalty in SETTINGS["ridge"]
    ]


def _fit_logistic(
    X: np.ndarray, y: np.ndarray, task: LearningTask, outputs: int
) -> list[dict[str, np.ndarray]]:
    """Fit logistic regression with every penalty, each begun where the one before has ended."""
    from sklearn.linear_model import LogisticRegression

    columns = list(y.T) if task == "multilabel" else [y]
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in SETTINGS["logistic"]]
    for column in columns:
        if task == "multilabel" and column.all() == column.any():  # always there or never: a constant
            always = np.array([30.0 if column.all() else -30.0])
            for each in found:
                each.append((np.zeros((1, X.shape[1])), always))
            continue
        model = LogisticRegression(max_iter=1_000, warm_start=True)
        for place in reversed(range(len(found))):  # the largest penalty first, which is the easiest
            model.set_params(C=1 / SETTINGS["logistic"][place])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fit that ends early is judged by its predictions
                model.fit(X, column)
            found[place].append((model.coef_.copy(), model.intercept_.copy()))
    return [_linear_tensors(each, task, outputs) for each in found]


def _linear_tensors(
    parts: list[tuple[np.ndarray, np.ndarray]], task: LearningTask, outputs: int
) -> dict[str, np.ndarray]:
    """Return weights and intercepts with a column for each class or label."""
    weights = np.concatenate([coefficients for coefficients, _ in parts]).T
    intercept = np.concatenate([each for _, each in parts])
    if task == "classification" and outputs == 2:
        weights = np.concatenate([np.zeros_like(weights), weights], 1)
        intercept = np.concatenate([np.zeros(1), intercept])
    return {"weights": np.ascontiguousarray(weights), "intercept": intercept}


def _fit_mlp(X: np.ndarray, y: np.ndarray, task: LearningTask, outputs: int) -> list[dict[str, np.ndarray]]:
    """Fit a network of one hidden layer of 64 units with every penalty, stopped early by a tenth of rows."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    centre, scale = (y.mean(), y.std()) if task == "regression" else (0.0, 1.0)
    targets = (y - centre) / scale if task == "regression" else y.astype(int)
    kind = MLPRegressor if task == "regression" else MLPClassifier
    early = len(X) >= LEAST_FOR_STOPPING and (task != "classification" or np.bincount(targets).min() > 1)
    fitted = []
    for penalty in SETTINGS["mlp"]:
        model = kind(
            hidden_layer_sizes=(64,), alpha=penalty, early_stopping=early, random_state=0, max_iter=300
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(X, targets)
        (first, last), (hidden, out) = model.coefs_, model.intercepts_
        if task == "classification" and outputs == 2:
            last, out = np.concatenate([0 * last, last], 1), np.concatenate([0 * out, out])
        fitted.append(
            {
                "hidden": first,
                "hidden_intercept": hidden,
                "weights": last * scale,
                "intercept": out * scale + centre,
            }
        )
    return fitted


def _fit_neighbours(
    X: np.ndarray, y: np.ndarray, task: LearningTask, outputs: int
) -> list[dict[str, np.ndarray]]:
    """Keep the rows, with each number of neighbours."""
    targets = np.eye(outputs)[y] if task == "classification" else y.reshape(len(y), -1).astype(float)
    rows = X.astype(np.float32)
    return [
        {"rows": rows, "targets": targets, "neighbours": np.array([min(int(number), len(X))])}
        for number in SETTINGS["knn"]
    ]


def _fit_process(
    X: np.ndarray, y: np.ndarray, task: LearningTask, outputs: int
) -> list[dict[str, np.ndarray]]:
    """Fit a Gaussian process with noise, whose scales maximise the likelihood of these rows."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    if len(X) > MOST_FOR_PROCESS:
        raise ValueError(
            f"expected at most {MOST_FOR_PROCESS:,} rows for a Gaussian process, got {len(X):,}: take "
            "another head"
        )
    kernel = ConstantKernel() * RBF(np.sqrt(X.shape[1]), (0.1, 1e4)) + WhiteKernel()
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    smooth = model.kernel_.k1
    scale = y.std()
    return [
        {
            "rows": X,
            "weights": (model.alpha_ * scale * smooth.k1.constant_value).reshape(-1, 1),
            "intercept": np.array([y.mean()]),
            "length": np.array([smooth.k2.length_scale]),
        }
    ]


def _predict_linear(X: np.ndarray, tensors: Mapping[str, np.ndarray], task: LearningTask) -> np.ndarray:
    return _finish(X @ tensors["weights"] + tensors["intercept"], task)


def _predict_mlp(X: np.ndarray, tensors: Mapping[str, np.ndarray], task: LearningTask) -> np.ndarray:
    hidden = np.maximum(X @ tensors["hidden"] + tensors["hidden_intercept"], 0)
    return _predict_linear(hidden, tensors, task)


def _predict_neighbours(X: np.ndarray, tensors: Mapping[str, np.ndarray], task: LearningTask) -> np.ndarray:
    number = int(tensors["neighbours"][0])
    near = np.argpartition(_distances(X, tensors["rows"]), number - 1, axis=1)[:, :number]
    return tensors["targets"][near].mean(1)


def _predict_process(X: np.ndarray, tensors: Mapping[str, np.ndarray], task: LearningTask) -> np.ndarray:
    nearness = np.exp(-0.5 * _distances(X, tensors["rows"]) / tensors["length"] ** 2)
    return nearness @ tensors["weights"] + tensors["intercept"]


def _distances(X: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return `(rows of X, rows)` squared distances."""
    exact = rows.astype(np.float64)
    squares = np.square(X).sum(1)[:, None] + np.square(exact).sum(1) - 2 * X @ exact.T
    return np.maximum(squares, 0)


def _finish(scores: np.ndarray, task: LearningTask) -> np.ndarray:
    """Turn scores into probabilities, where classes or labels are predicted."""
    if task == "regression":
        return scores
    if task == "multilabel":
        return 0.5 * (1 + np.tanh(scores / 2))
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


Fit = Callable[[np.ndarray, np.ndarray, LearningTask, int], list[dict[str, Any]]]
_FITTING: Final[Mapping[HeadName, Fit]] = {
    "ridge": _fit_ridge,
    "logistic": _fit_logistic,
    "mlp": _fit_mlp,
    "knn": _fit_neighbours,
    "gp": _fit_process,
}
_PREDICTING: Final[
    Mapping[HeadName, Callable[[np.ndarray, Mapping[str, np.ndarray], LearningTask], np.ndarray]]
] = {
    "ridge": _predict_linear,
    "logistic": _predict_linear,
    "mlp": _predict_mlp,
    "knn": _predict_neighbours,
    "gp": _predict_process,
}
