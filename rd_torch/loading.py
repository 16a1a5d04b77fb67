"""Read the backbones of a checkpoint as modules, and write a chain to a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from torch import nn

from rd_torch.backbone import FAMILIES
from rd_torch.chain import Chain
from rd_torch.choices import Storage, check_choice
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
    """Read the backbones of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        others: backbones to take from elsewhere, by level: modules, or where their files are.
        hub: how to reach the Hub.
        dtype: dtype of the weights; by default the stored one in a checkpoint of ours, else float32.
        device: device to put the weights on; by default the CPU.

    Returns:
        The backbones by level, smallest first.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that cannot be read or does not fit, or an unknown level.
    """
    for name in others:
        checkpoint.config.require_level(name)
    family: dict[str, nn.Module] = {}
    for level in checkpoint.config.levels:
        other = others.get(level.name)
        if isinstance(other, nn.Module):
            family[level.name] = _convert_module(other, dtype, device)
            continue
        found, tensors = checkpoint.read_backbone(level, other, hub, dtype=dtype, device=device)
        family[level.name] = FAMILIES[found.family].from_tensors(found, tensors)
    return family


def write_chain(chain: Chain, folder: Path, backbones: Storage, hub: Hub, name: str) -> None:
    """Write the config, maps, model card and backbones of a chain to a folder.

    Args:
        chain: the chain.
        folder: the folder to write; it is made if it does not exist.
        backbones: `"included"` to write the backbones' weights too, or `"referenced"` to write only where on
            the Hub they are.
        hub: how to reach the Hub, where the files are with which referenced backbones are compared.
        name: name of the chain in the model card.

    Raises:
        ValueError: for a backbone that is to be referenced but did not come from the Hub, or was changed
            since; and for a quantised one, whose weights are no plain tensors.
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


def _convert_module(module: nn.Module, dtype: torch.dtype | None, device: Device) -> nn.Module:
    """Return a module in `dtype` and on `device`: itself, or a copy, so that the caller's stays as it is."""
    weight = next(module.parameters())
    if dtype in (None, weight.dtype) and (device is None or torch.device(device) == weight.device):
        return module
    return copy.deepcopy(module).to(device=device, dtype=dtype)
