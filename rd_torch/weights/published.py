"""Read the authors' maps: `.npz` files of `singhlab/plm_reverse_distillation` (Catrina et al., ICLR 2026)."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypedDict, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from rd_torch.choices import (
    PCA,
    Method,
    PredictFrom,
    PublishedRegressor,
    SequenceCount,
    SpecialRows,
    check_choice,
)
from rd_torch.config import Explained, RDConfig
from rd_torch.levels import ESM2_LEVELS, Reference
from rd_torch.stage import STAGES
from rd_torch.weights.hub import Hub
from rd_torch.weights.known import ESM2_ON_HUB, PUBLISHED_MAPS
from rd_torch.weights.tensors import Tensors, require_file, require_finite

FOLDER: Final = "weights"
"""The folder of the authors' repository that holds the maps."""

Array: TypeAlias = NDArray[np.float64]

# What numpy raises for files that are cut off, damaged, or would run code.
_BROKEN: Final = (ValueError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error)

# How far an input mean may be from that of nested embeddings, as a share of the step before's largest.
# Sums in float32 leave a difference of about 1e-5; means of raw embeddings differ far more.
_TOLERANCE: Final = 1e-2


class PublishedOptions(TypedDict, total=False):
    """Which of the authors' maps to read, and how to apply them.

    Attributes:
        method: `"rd"` (default) for reverse distillation, or `"naive"` for the baseline.
        regressor: kind of regression: `"pcr"` (default), `"linear"` or `"ridge"`.
        pca: kind of principal-component analysis: `"incremental"` (default) or `"fbpca"`.
        sequences: number of sequences that the maps were fitted on: `"0.5k"`, `"1k"` (default), `"5k"` or
            `"10k"`.
        predict_from: embedding that W acts on: `"nested"` (default), as in the published model, or
            `"previous"`, the raw one of the previous backbone.
        special_rows: embeddings of `<cls>`, `<eos>` and `<mask>`: those of the `"maps"` (default), or of the
            `"larger"` backbone, as in the published model.
    """

    method: Method
    regressor: PublishedRegressor
    pca: PCA
    sequences: SequenceCount
    predict_from: PredictFrom
    special_rows: SpecialRows


@dataclass(frozen=True)
class Choice:
    """The options of `PublishedOptions` with their defaults, checked."""

    method: Method = "rd"
    regressor: PublishedRegressor = "pcr"
    pca: PCA = "incremental"
    sequences: SequenceCount = "1k"
    predict_from: PredictFrom = "nested"
    special_rows: SpecialRows = "maps"

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("regressor", self.regressor, get_args(PublishedRegressor))
        check_choice("pca", self.pca, get_args(PCA))
        check_choice("sequences", self.sequences, get_args(SequenceCount))

    def file_name(self, smaller: str, larger: str) -> str:
        """Return the name of the file with the maps from one level to the next."""
        regressor = self.regressor if self.method == "rd" else "None"
        return f"{self.method}-scaler-{smaller}-{larger}-{regressor}-{self.pca}-{self.sequences}.npz"


def holds_published_maps(folder: Path) -> bool:
    """Return whether a folder is a copy of the authors' repository."""
    return any((folder / FOLDER).glob("*-scaler-*.npz"))


def read_published(
    folder: Path | None, level: str | None, choice: Choice, hub: Hub, revision: str | None = None
) -> tuple[RDConfig, dict[str, Tensors]]:
    """Read the authors' maps up to a level.

    A warning says so if the maps look fitted on other embeddings than they will act on.

    Args:
        folder: a local copy of the authors' repository; without one the maps come from the Hub.
        level: name of the level at which the chain ends.
        choice: which of the maps to read, and how to apply them.
        hub: how to reach the Hub.
        revision: commit, tag or branch of the repository.

    Returns:
        The config of the chain, and by level the tensors of the stage that leads to it.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for an unknown level, or a file that cannot be read or does not fit.
    """
    check_choice("the level of the authors' maps", level, tuple(ESM2_LEVELS))
    levels = list(ESM2_LEVELS.values())[: list(ESM2_LEVELS).index(str(level)) + 1]
    widths, steps, reference = [levels[0].width], [], Reference(PUBLISHED_MAPS, revision)
    for smaller, larger in pairwise(levels):
        name = f"{FOLDER}/{choice.file_name(smaller.name, larger.name)}"
        if folder:
            path = require_file(folder / name)
        else:
            path, commit, _ = hub.fetch(reference, name)
            reference = Reference(PUBLISHED_MAPS, commit)  # all files have to be of one commit
        source = smaller.width if choice.predict_from == "previous" else widths[-1]
        steps.append(_read_step(path, choice, source=source, nested=widths[-1], larger=larger.width))
        widths.append(steps[-1].width)
    fitted = tell_fit_input([step.input_mean for step in steps])
    if choice.method == "rd" and len(steps) > 1:
        _warn_of_inputs(fitted, choice.predict_from)
    config = RDConfig(
        levels=tuple(replace(level, reference=ESM2_ON_HUB[level.name]) for level in levels),
        added=tuple(after - before for before, after in pairwise(widths)),
        explained=tuple(step.explained for step in steps),
        predict_from=choice.predict_from,
        special_rows=choice.special_rows,
        provenance={
            "maps": folder.name if folder else PUBLISHED_MAPS,
            "options": asdict(choice),
            "fitted_on": fitted,
        },
        method=choice.method,
    )
    return config, {level.name: step.tensors for level, step in zip(levels[1:], steps, strict=True)}


def tell_fit_input(input_means: Sequence[Array | None]) -> PredictFrom | None:
    """Tell on which embeddings a chain of regressions was fitted.

    If on nested ones, each input mean begins with that of the step before and goes on with zeros, for the
    features that a step adds have mean zero.

    Args:
        input_means: `(width,)` mean of what each regression was fitted on, or None where the file has none.

    Returns:
        The embeddings; None where it cannot be told, without means or for a single step.
    """
    known = [mean for mean in input_means if mean is not None]
    if len(known) < len(input_means) or len(known) < 2:
        return None
    nested = all(
        len(before) <= len(mean)
        and np.abs(mean[: len(before)] - before).max() <= _TOLERANCE * np.abs(before).max()
        and np.abs(mean[len(before) :]).max(initial=0) <= _TOLERANCE * np.abs(before).max()
        for before, mean in pairwise(known)
    )
    return "nested" if nested else "previous"


class _Step(NamedTuple):
    """One step's tensors, the width that it leads to, what it explains, and its regression's input mean."""

    tensors: Tensors
    width: int
    explained: Explained | None
    input_mean: Array | None


def _read_step(path: Path, choice: Choice, *, source: int, nested: int, larger: int) -> _Step:
    """Read the maps in one file, and require that they fit the widths of a step's three embeddings."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
        tensors = _CONVERTERS[choice.method](arrays, choice)
    except KeyError as error:
        raise ValueError(
            f"expected {choice.regressor} maps with {error} in {path}, got a file without it"
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"expected an .npz of numbers in {path}, got a file that cannot be read, or that would run code "
            f"if it were trusted; nothing of it was run: {error}"
        ) from error
    kind = STAGES[choice.method]
    rows = {name: shape[0] for name, shape in kind.shapes(nested, larger, source, added=0).items()}
    got = {name: tensors[name].shape[0] for name in rows}
    if got != rows:
        raise ValueError(
            f"expected maps with {rows} rows in {path}, got {got}: they are of another family or renamed"
        )
    require_finite(tensors, path)
    ratio = arrays.get("pca__explained_variance_ratio_")
    return _Step(
        tensors,
        kind(**tensors, explained=None).width_after(nested),
        None if ratio is None else Explained(r2=None, kept=float(ratio.sum())),
        arrays.get("regressor__input_mean_"),
    )


def _convert_rd(arrays: Mapping[str, Array], choice: Choice) -> Tensors:
    """Return W, b, m and V of a regression and the principal components of its residual."""
    coefficients, intercept = arrays["regressor__coef_"], arrays["regressor__intercept_"]
    if choice.regressor == "pcr":
        kept = int(arrays["regressor__n_significant_pcs_"])
        W = arrays["regressor__input_components_"][:, :kept] @ coefficients.T
        b = intercept + arrays["regressor__output_mean_"] - arrays["regressor__input_mean_"] @ W
    else:
        W, b = coefficients.T, intercept
    return _as_float32({"W": W, "b": b, "m": arrays["pca__mean_"], "V": arrays["pca__components_"].T})


def _convert_naive(arrays: Mapping[str, Array], _: Choice) -> Tensors:
    """Return the mean and the principal components of two embeddings side by side."""
    return _as_float32({"mean": arrays["pca__mean_"], "components": arrays["pca__components_"].T})


_CONVERTERS: Final = {"rd": _convert_rd, "naive": _convert_naive}


def _as_float32(arrays: Mapping[str, Array]) -> Tensors:
    return {name: torch.from_numpy(array.astype(np.float32, order="C")) for name, array in arrays.items()}


def _warn_of_inputs(fitted: PredictFrom | None, applied: PredictFrom) -> None:
    """Warn if maps act on other embeddings than they were fitted on, or if that cannot be told."""
    if fitted is None:
        warnings.warn(
            "linear and ridge maps do not say whether they were fitted on nested or on raw embeddings; these "
            f'are applied as predict_from="{applied}" says',
            stacklevel=4,
        )
    elif fitted != applied:
        inputs = {"nested": "the nested embedding", "previous": "the previous backbone's raw embedding"}
        warnings.warn(
            f"these maps look fitted on {inputs[fitted]}, but are applied to {inputs[applied]}; "
            f'predict_from="{fitted}" applies them as they were fitted',
            stacklevel=4,
        )
