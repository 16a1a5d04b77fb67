"""Between a chain and its files: backbones and stages are read, a chain is written to a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from torch import nn

from rd_torch.backbone import ESM2
from rd_torch.chain import Chain
from rd_torch.config import Storage, check_choice
from rd_torch.modules import StateDict
from rd_torch.weights import Checkpoint, Hub, Source, require_unchanged, write_folder

Device: TypeAlias = torch.device | str | None


def read_family(
    checkpoint: Checkpoint,
    others: Mapping[str, Source | nn.Module],
    hub: Hub,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> dict[str, nn.Module]:
    """Reads the backbones of a checkpoint, smallest first.

    Args:
        checkpoint: which levels there are, and where their backbones lie.
        others: backbones by level that are taken from elsewhere.
        hub: how to reach the Hub.
        dtype: of the weights, by default as the checkpoint stores them, or float32.
        device: where they go.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that does not read or fit, or an unknown level.
    """
    for name in others:
        checkpoint.config.require_level(name)
    family: dict[str, nn.Module] = {}
    for level in checkpoint.config.levels:
        other = others.get(level.name)
        family[level.name] = (
            _fitted(other, dtype, device)
            if isinstance(other, nn.Module)
            else ESM2.from_tensors(*checkpoint.read_backbone(level, other, hub, dtype=dtype, device=device))
        )
    return family


def write_chain(chain: Chain, folder: Path, backbones: Storage, hub: Hub, name: str) -> None:
    """Writes config, maps, model card and backbones to a folder.

    Args:
        chain: what is written.
        folder: made if need be.
        backbones: whether they are included or referenced.
        hub: how to reach what references are compared with.
        name: what the card calls the chain.

    Raises:
        ValueError: for a reference to a backbone that came from elsewhere or was changed since, or a
            quantised one, whose weights are no plain tensors.
    """
    check_choice("backbones", backbones, get_args(Storage))
    tensors = {level: backbone.tensors() for level, backbone in chain.backbones.items()}
    levels = chain.config.levels
    for level_name, state in tensors.items():
        state.require_plain(f"level {level_name}")
    if backbones == "referenced":
        for level in levels:
            require_unchanged(level, tensors.pop(level.name), hub)
    else:
        levels = tuple(replace(level, reference=None) for level in levels)
    maps = {level: StateDict(stage) for level, stage in chain.stages.items()}
    write_folder(folder, replace(chain.config, levels=levels), maps, tensors, name)


def _fitted(module: nn.Module, dtype: torch.dtype | None, device: Device) -> nn.Module:
    """The module itself, or a copy where it would have to be converted or moved."""
    weight = next(module.parameters())
    if dtype in (None, weight.dtype) and (device is None or torch.device(device) == weight.device):
        return module
    return copy.deepcopy(module).to(device=device, dtype=dtype)
