"""fair-esm's functions that load a model and its alphabet.

Examples:
    >>> model, alphabet = rd_torch.pretrained.esm2_rd_650M()  # downloads ESM-2 and the authors' maps
    >>> model, alphabet = rd_torch.pretrained.load_model_and_alphabet("esm2-rd-mini")
    >>> model.embed_dim
    128
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import torch
from torch import nn

from rd_torch.alphabet import Alphabet
from rd_torch.config import ESM2_LEVELS, PCA, Method, PublishedRegressor, SequenceCount, check_choice
from rd_torch.model import RDModel
from rd_torch.weights import PUBLISHED_MAPS, Source

_PREFIXES: Final = ("esm2.rd/", "esm2_rd_")
_COUNTS: Final[dict[int, SequenceCount]] = {500: "0.5k", 1_000: "1k", 5_000: "5k", 10_000: "10k"}


class Options(TypedDict, total=False):
    """Which of the authors' maps, in the words of their own implementation, and where the model goes.

    Attributes:
        scaler_type: `"rd"`, or the baseline `"naive"`.
        regressor_type: `"pcr"`, `"linear"` or `"ridge"`.
        pca_type: `"incremental"` or `"fbpca"`.
        n_pretrained_seqs: sequences they were fitted on: 500, 1000 (default), 5000 or 10000.
        backbones: as in `RDModel.from_pretrained`, and so are the others.
    """

    scaler_type: Method
    regressor_type: PublishedRegressor
    pca_type: PCA
    n_pretrained_seqs: int
    backbones: dict[str, Source | nn.Module]
    dtype: torch.dtype
    device: torch.device | str
    revision: str
    cache_dir: str | Path
    local_files_only: bool


_NAMES: Final = {"scaler_type": "method", "regressor_type": "regressor", "pca_type": "pca"}


def load_model_and_alphabet(name: str | Path, **options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """A model in `eval` mode and its alphabet, as fair-esm's function of that name returns them.

    Args:
        name: `"esm2.rd/650M"` or `"esm2_rd_650M"` for the authors' maps over ESM-2, or whatever else
            `RDModel.from_pretrained` takes.
        **options: see `Options`.

    Raises:
        FileNotFoundError: where nothing is, here or on the Hub.
        ValueError: for an unknown level or option, or files that do not read or fit.
    """
    for prefix in _PREFIXES:
        if str(name).startswith(prefix):
            level = str(name).removeprefix(prefix)
            check_choice("level", level, tuple(ESM2_LEVELS)[1:])
            return _load(level, options)
    known = {key: value for key, value in options.items() if key not in {*_NAMES, "n_pretrained_seqs"}}
    if len(known) < len(options):
        raise ValueError(f"expected options of the authors' maps for those alone, got them for {name}")
    model = RDModel.from_pretrained(name, **known)  # type: ignore[arg-type]  # a dict of the TypedDict's own
    return model, model.alphabet


def esm2_rd_35M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """8M and 35M, 480 features, with the authors' maps; see `Options`."""
    return _load("35M", options)


def esm2_rd_150M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """8M to 150M, 640 features, with the authors' maps; see `Options`."""
    return _load("150M", options)


def esm2_rd_650M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """8M to 650M, 1,280 features, with the authors' maps; see `Options`."""
    return _load("650M", options)


def esm2_rd_3B(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """8M to 3B, 2,560 features, with the authors' maps; see `Options`."""
    return _load("3B", options)


def esm2_rd_15B(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """8M to 15B, 5,120 features, with the authors' maps; see `Options`."""
    return _load("15B", options)


def _load(level: str, options: Options) -> tuple[RDModel, Alphabet]:
    """The chain of the authors' maps that ends at `level`, and its alphabet."""
    given: dict[str, Any] = dict(options)
    count = given.pop("n_pretrained_seqs", 1_000)
    if count not in _COUNTS:
        raise ValueError(f"expected n_pretrained_seqs of {', '.join(map(str, _COUNTS))}, got {count!r}")
    renamed = {_NAMES.get(key, key): value for key, value in given.items()}
    model = RDModel.from_pretrained(PUBLISHED_MAPS, level, sequences=_COUNTS[count], **renamed)
    return model, model.alphabet
