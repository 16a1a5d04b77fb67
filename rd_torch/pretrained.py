"""Load a model and its alphabet by functions that are called as fair-esm's are.

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
from rd_torch.choices import PCA, Method, PublishedRegressor, SequenceCount, check_choice
from rd_torch.levels import ESM2_LEVELS
from rd_torch.model import RDModel
from rd_torch.weights import PUBLISHED_MAPS, Source

_PREFIXES: Final = ("esm2.rd/", "esm2_rd_")
_COUNTS: Final[dict[int, SequenceCount]] = {500: "0.5k", 1_000: "1k", 5_000: "5k", 10_000: "10k"}


class Options(TypedDict, total=False):
    """Which of the authors' maps to load, by the names of their own implementation, and where to put them.

    Attributes:
        scaler_type: `"rd"` (default) for reverse distillation, or `"naive"` for the baseline.
        regressor_type: kind of regression: `"pcr"` (default), `"linear"` or `"ridge"`.
        pca_type: kind of principal-component analysis: `"incremental"` (default) or `"fbpca"`.
        n_pretrained_seqs: number of sequences that the maps were fitted on: 500, 1000 (default), 5000 or
            10000.
        backbones: backbones to take from elsewhere, by level: modules, or where their files are.
        dtype: dtype of the backbones' weights; by default float32, or the stored one in a checkpoint of ours.
        device: device to put the model on; by default the CPU.
        revision: commit, tag or branch of a Hub id.
        cache_dir: folder of the Hub's cache; by default the Hub's own.
        local_files_only: whether to take files from the cache alone, without the network.
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


# What the options that the authors named are called in `RDModel.from_pretrained`.
_NAMES: Final = {"scaler_type": "method", "regressor_type": "regressor", "pca_type": "pca"}


def load_model_and_alphabet(name: str | Path, **options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load a model and its alphabet, as fair-esm's function of that name does.

    Args:
        name: `"esm2.rd/650M"` or `"esm2_rd_650M"` for ESM-2 with the authors' maps, and likewise for the
            other levels; or anything else that `RDModel.from_pretrained` takes.
        **options: see `Options`; those that choose among the authors' maps go with these alone.

    Returns:
        The model in `eval` mode, and its alphabet.

    Raises:
        FileNotFoundError: if nothing is there, here or on the Hub.
        ValueError: for an unknown level or option, or files that cannot be read or do not fit.
    """
    for prefix in _PREFIXES:
        if str(name).startswith(prefix):
            level = str(name).removeprefix(prefix)
            check_choice("level", level, tuple(ESM2_LEVELS)[1:])
            return _load(level, options)
    known = {key: value for key, value in options.items() if key not in {*_NAMES, "n_pretrained_seqs"}}
    if len(known) < len(options):
        raise ValueError(f"expected options of the authors' maps with these alone, got them with {name}")
    model = RDModel.from_pretrained(name, **known)  # type: ignore[arg-type]  # a dict of the TypedDict's own
    return model, model.alphabet


def esm2_rd_35M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load the chain of ESM-2 8M and 35M, 480 features wide, with the authors' maps.

    Args:
        **options: see `Options`.

    Returns:
        The model in `eval` mode, and its alphabet.
    """
    return _load("35M", options)


def esm2_rd_150M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load the chain of ESM-2 8M to 150M, 640 features wide, with the authors' maps.

    Args:
        **options: see `Options`.

    Returns:
        The model in `eval` mode, and its alphabet.
    """
    return _load("150M", options)


def esm2_rd_650M(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load the chain of ESM-2 8M to 650M, 1,280 features wide, with the authors' maps.

    Args:
        **options: see `Options`.

    Returns:
        The model in `eval` mode, and its alphabet.
    """
    return _load("650M", options)


def esm2_rd_3B(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load the chain of ESM-2 8M to 3B, 2,560 features wide, with the authors' maps.

    Args:
        **options: see `Options`.

    Returns:
        The model in `eval` mode, and its alphabet.
    """
    return _load("3B", options)


def esm2_rd_15B(**options: Unpack[Options]) -> tuple[RDModel, Alphabet]:
    """Load the chain of ESM-2 8M to 15B, 5,120 features wide, with the authors' maps.

    Args:
        **options: see `Options`.

    Returns:
        The model in `eval` mode, and its alphabet.
    """
    return _load("15B", options)


def _load(level: str, options: Options) -> tuple[RDModel, Alphabet]:
    """Load the chain with the authors' maps that ends at `level`, and its alphabet."""
    count = options.get("n_pretrained_seqs", 1_000)
    if count not in _COUNTS:
        raise ValueError(
            f"expected n_pretrained_seqs to be one of {', '.join(map(str, _COUNTS))}, got {count!r}"
        )
    renamed: dict[str, Any] = {
        _NAMES.get(key, key): value for key, value in options.items() if key != "n_pretrained_seqs"
    }
    model = RDModel.from_pretrained(PUBLISHED_MAPS, level, sequences=_COUNTS[count], **renamed)
    return model, model.alphabet
