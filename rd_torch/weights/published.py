"""The authors' maps: `.npz` files of `singhlab/plm_reverse_distillation` (Catrina et al., ICLR 2026)."""

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

from rd_torch.config import (
    ESM2_LEVELS,
    PCA,
    Explained,
    Method,
    PredictFrom,
    PublishedRegressor,
    RDConfig,
    Reference,
    SequenceCount,
    SpecialRows,
    check_choice,
)
from rd_torch.stage import STAGES
from rd_torch.weights.hub import Hub
from rd_torch.weights.known import ESM2_ON_HUB, PUBLISHED_MAPS
from rd_torch.weights.tensors import Tensors, require_file, require_finite

FOLDER: Final = "weights"
Array: TypeAlias = NDArray[np.float64]

_BROKEN: Final = (ValueError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error)

# An input mean counts as the nested one's when it repeats the level before to this share of its size,
# and its added features have means this small: sums in float32 leave about 1e-5.
_SAME: Final = 1e-2


class PublishedOptions(TypedDict, total=False):
    """Which of the published maps, and how they are applied.

    Attributes:
        method: `"rd"`, or the baseline `"naive"`.
        regressor: kind of regression.
        pca: kind of principal-component analysis.
        sequences: number of sequences they were fitted on.
        predict_from: what W acts on; `"nested"` as the published model has it.
        special_rows: `"larger"` leaves special tokens as the published model does.
    """

    method: Method
    regressor: PublishedRegressor
    pca: PCA
    sequences: SequenceCount
    predict_from: PredictFrom
    special_rows: SpecialRows


@dataclass(frozen=True)
class Choice:
    """The options with their defaults, checked."""

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
        """The maps from one level to the next."""
        regressor = self.regressor if self.method == "rd" else "None"
        return f"{self.method}-scaler-{smaller}-{larger}-{regressor}-{self.pca}-{self.sequences}.npz"


def holds_published_maps(folder: Path) -> bool:
    """Whether a folder is a copy of the authors' repository."""
    return any((folder / FOLDER).glob("*-scaler-*.npz"))


def read_published(
    folder: Path | None, level: str | None, choice: Choice, hub: Hub, revision: str | None = None
) -> tuple[RDConfig, dict[str, Tensors]]:
    """Config and maps of the chain that ends at `level`, from a local copy or, without one, from the Hub.

    Warns when the maps do not look fitted on what they will act on.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for an unknown level or option, or a file that does not read or fit.
    """
    check_choice("the level of the authors' maps", level, tuple(ESM2_LEVELS))
    levels = list(ESM2_LEVELS.values())[: list(ESM2_LEVELS).index(str(level)) + 1]
    widths, chain, reference = [levels[0].width], [], Reference(PUBLISHED_MAPS, revision)
    for smaller, larger in pairwise(levels):
        name = f"{FOLDER}/{choice.file_name(smaller.name, larger.name)}"
        if folder:
            path = require_file(folder / name)
        else:
            path, commit, _ = hub.fetch(reference, name)
            reference = Reference(PUBLISHED_MAPS, commit)  # all files have to be of one
        source = smaller.width if choice.predict_from == "previous" else widths[-1]
        chain.append(_read_map(path, choice, source=source, nested=widths[-1], q=larger.width))
        widths.append(chain[-1].width)
    fitted = fitted_on([part.input_mean for part in chain])
    if choice.method == "rd" and len(chain) > 1:
        _warn_of_inputs(fitted, choice.predict_from)
    config = RDConfig(
        levels=tuple(replace(level, reference=ESM2_ON_HUB[level.name]) for level in levels),
        added=tuple(after - before for before, after in pairwise(widths)),
        explained=tuple(part.explained for part in chain),
        predict_from=choice.predict_from,
        special_rows=choice.special_rows,
        provenance={
            "maps": folder.name if folder else PUBLISHED_MAPS,
            "options": asdict(choice),
            "fitted_on": fitted,
        },
        method=choice.method,
    )
    return config, {level.name: part.tensors for level, part in zip(levels[1:], chain, strict=True)}


def fitted_on(input_means: Sequence[Array | None]) -> PredictFrom | None:
    """What a chain of regressions was fitted on, told from the means of their inputs.

    Fitted on nested embeddings, an input mean begins with the level before's and goes on with zeros.

    Returns:
        None where it cannot be told: no means, or a single stage, for which both are the same.
    """
    known = [mean for mean in input_means if mean is not None]
    if len(known) < len(input_means) or len(known) < 2:
        return None
    nested = all(
        len(before) <= len(mean)
        and np.abs(mean[: len(before)] - before).max() <= _SAME * np.abs(before).max()
        and np.abs(mean[len(before) :]).max(initial=0) <= _SAME * np.abs(before).max()
        for before, mean in pairwise(known)
    )
    return "nested" if nested else "previous"


class _Map(NamedTuple):
    """One step's tensors, the width it leads to, what it explains and the mean of its fit's input."""

    tensors: Tensors
    width: int
    explained: Explained | None
    input_mean: Array | None


def _read_map(path: Path, choice: Choice, *, source: int, nested: int, q: int) -> _Map:
    """One file's maps, checked against the widths that they have to fit."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
        tensors = _READERS[choice.method](arrays, choice)
    except KeyError as error:
        raise ValueError(f"expected {choice.regressor} maps with {error} in {path}, got none") from error
    except _BROKEN as error:
        raise ValueError(
            f"expected an .npz of numbers in {path}, got one that does not read, or that would run code if "
            f"it were trusted; nothing of it was run: {error}"
        ) from error
    kind = STAGES[choice.method]
    rows = {name: shape[0] for name, shape in kind.shapes(nested, q, source, added=0).items()}
    got = {name: tensors[name].shape[0] for name in rows}
    if got != rows:
        raise ValueError(f"expected maps with {rows} rows in {path}, got {got}: another family's, or renamed")
    require_finite(tensors, path)
    ratio = arrays.get("pca__explained_variance_ratio_")
    return _Map(
        tensors,
        kind(**tensors, explained=None).width_after(nested),
        None if ratio is None else Explained(r2=None, kept=float(ratio.sum())),
        arrays.get("regressor__input_mean_"),
    )


def _rd(arrays: Mapping[str, Array], choice: Choice) -> Tensors:
    """W, b, m and V from a regression and the components of its residual."""
    coefficients, intercept = arrays["regressor__coef_"], arrays["regressor__intercept_"]
    if choice.regressor == "pcr":
        kept = int(arrays["regressor__n_significant_pcs_"])
        W = arrays["regressor__input_components_"][:, :kept] @ coefficients.T
        b = intercept + arrays["regressor__output_mean_"] - arrays["regressor__input_mean_"] @ W
    else:
        W, b = coefficients.T, intercept
    return _float32({"W": W, "b": b, "m": arrays["pca__mean_"], "V": arrays["pca__components_"].T})


def _naive(arrays: Mapping[str, Array], _: Choice) -> Tensors:
    """Mean and components of two embeddings side by side."""
    return _float32({"mean": arrays["pca__mean_"], "components": arrays["pca__components_"].T})


_READERS: Final = {"rd": _rd, "naive": _naive}


def _float32(arrays: Mapping[str, Array]) -> Tensors:
    return {name: torch.from_numpy(array.astype(np.float32, order="C")) for name, array in arrays.items()}


def _warn_of_inputs(fitted: PredictFrom | None, applied: PredictFrom) -> None:
    """Warns, once a load, when maps act on something else than they were fitted on, or may."""
    if fitted is None:
        warnings.warn(
            "what these maps were fitted on, nested or raw embeddings, cannot be told from linear and ridge "
            f'files; they are applied to what predict_from="{applied}" says',
            stacklevel=4,
        )
    elif fitted != applied:
        inputs = {"nested": "the nested embedding", "previous": "the previous backbone's raw embedding"}
        warnings.warn(
            f"these maps look fitted on {inputs[fitted]} and are applied to {inputs[applied]}; "
            f'predict_from="{fitted}" applies them as they were fitted',
            stacklevel=4,
        )
