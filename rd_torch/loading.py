"""Read the backbones of a checkpoint as modules, and write a chain to a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn

from rd_torch.backbone import Backbone, TransformersBackbone, as_backbone, class_of
from rd_torch.chain import Chain
from rd_torch.choices import Storage, check_choice
from rd_torch.config import RDConfig
from rd_torch.levels import TRANSFORMERS_FAMILY, Level, Reference, split_level
from rd_torch.maps import Maps
from rd_torch.modules import StateDict, as_module_name
from rd_torch.reconstruct import Reconstructor, tensors_to_save
from rd_torch.stage import stages_of
from rd_torch.weights import (
    BACKBONES,
    CONFIG,
    Checkpoint,
    Hub,
    PublishedOptions,
    Source,
    at_layers,
    find_backbone,
    is_native,
    read_backbone,
    read_checkpoint,
    read_level,
    require_unchanged,
    write_folder,
)

FOREIGN: Final = "hf:"
"""What stands before the name of a model that transformers is to load, whatever it is."""


class Place(NamedTuple):
    """How weights are held, and where.

    Attributes:
        dtype: dtype of the weights; None for the stored one in a checkpoint of ours, else float32.
        device: device to put the weights on; None for the CPU, or where a module is.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None


AS_IT_IS: Final = Place()


def read_parts(
    name_or_folder: str | Path,
    level: str | None,
    others: Mapping[str, Source | nn.Module] | None,
    hub: Hub,
    place: Place,
    revision: str | None = None,
    layers: Mapping[str, int] | None = None,
    **published: Unpack[PublishedOptions],
) -> tuple[RDConfig, dict[str, nn.Module], list[Maps], Reconstructor | None]:
    """Read what a chain is made of.

    Args:
        name_or_folder: the chain, as for `read_checkpoint`; or `hf:` and a folder or Hub id, which becomes a
            chain of one level.
        level: name of the level at which the chain ends; by default the last.
        others: backbones to take from elsewhere, by level, as `load_backbone` takes them.
        hub: how to reach the Hub, and whose code may run.
        place: how weights are held, and where.
        revision: commit, tag or branch of a Hub id.
        layers: by backbone, the layer of its level, as `at_layers` takes them.
        **published: which of the authors' maps to read.

    Returns:
        The config, the backbones by level, the stages, and what raw embeddings are reconstructed from.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that cannot be read or does not fit, or an unknown level or option.
    """
    if not is_foreign(name_or_folder):
        found = read_checkpoint(name_or_folder, level, hub, revision, **published)
        config = at_layers(found.config, layers or {})
        known = found.reconstructor if config == found.config else None  # of another layer otherwise
        family = read_family(replace(found, config=config), others or {}, hub, place)
        return config, family, list(stages_of(config, found.maps).values()), known
    if published or others:
        raise ValueError(f"expected {name_or_folder} alone, got it with options of chains of several levels")
    backbone = load_backbone(name_or_folder, hub, None, place, revision)
    name = level or as_module_name(Path(str(name_or_folder).removeprefix(FOREIGN)).resolve().name)
    config = at_layers(RDConfig((backbone.level(name),), (), ()), layers or {})
    return config, {config.levels[0].name: backbone}, [], None


def read_family(
    checkpoint: Checkpoint, others: Mapping[str, Source | nn.Module], hub: Hub, place: Place
) -> dict[str, nn.Module]:
    """Read the backbones of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        others: backbones to take from elsewhere, by their names or by level: modules, or where their files
            are.
        hub: how to reach the Hub.
        place: how weights are held, and where.

    Returns:
        The backbones by level, smallest first; levels of one backbone have the same module.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that cannot be read or does not fit, or an unknown level.
    """
    levels = checkpoint.config.levels
    deepest = {level.backbone: level for level in levels}  # levels of one backbone go by depth
    sources = {}
    for name, other in others.items():
        sources[split_level(name)[0]] = other
        if name not in deepest:
            checkpoint.config.require_level(name)
    family = {
        name: _read_one(checkpoint, level, sources.get(name), hub, place) for name, level in deepest.items()
    }
    return {level.name: family[level.backbone] for level in levels}


def _read_one(
    checkpoint: Checkpoint, level: Level, other: Source | nn.Module | None, hub: Hub, place: Place
) -> nn.Module:
    """Read the backbone of a level, as far as its layer."""
    if isinstance(other, nn.Module):
        return _convert_module(other, place)
    if is_foreign(other) or (other is None and level.family == TRANSFORMERS_FAMILY):
        return _read_foreign_level(checkpoint, level, other, hub, place)
    found, tensors = checkpoint.read_backbone(level, other, hub, **place._asdict())
    return class_of(found).from_tensors(found, tensors)


def load_backbone(
    source: Source | nn.Module,
    hub: Hub,
    name: str | None = None,
    place: Place = AS_IT_IS,
    revision: str | None = None,
) -> Backbone:
    """Load one backbone from wherever a user has it.

    Args:
        source: a file, a folder, a Hub id or a reference; `hf:` before a folder or a Hub id, for any model
            that transformers loads; or a module, which is shared unless it needs another dtype or device.
        hub: how to reach the Hub, and whose code may run.
        name: name of the level that the backbone is to be; sizes of ESM-2 and ESM-C must have their shapes.
            For `"650M@25"` no layer above 25 is read.
        place: how weights are held, and where.
        revision: commit, tag or branch of a Hub id.

    Returns:
        The backbone, in `eval` mode unless it was a module.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that cannot be read or does not fit, or that would run code.
        TypeError: for a module that is no backbone.
    """
    if isinstance(source, nn.Module):
        return as_backbone(_convert_module(source, place))
    exact = place._replace(dtype=place.dtype or torch.float32)
    if is_foreign(source):
        source = str(source).removeprefix(FOREIGN)
        if not is_native(source, hub, revision):
            return _read_foreign(source, hub, exact, revision=revision)
    if isinstance(source, str) and revision is not None and not Path(source).exists():
        source = Reference(source, revision)
    files = find_backbone(source, hub, name)
    level = read_level(files, name)
    tensors = read_backbone(files, level, **exact._asdict())
    return class_of(level).from_tensors(level, tensors).eval()


def is_foreign(source: object) -> bool:
    """Return whether a source names any model of transformers', which `hf:` before its name says."""
    return isinstance(source, str) and source.startswith(FOREIGN)


def _read_foreign(
    name: str, hub: Hub, place: Place, *, trusted: bool = False, **options: Any
) -> TransformersBackbone:
    """Load any model of transformers' by the name of its folder or its Hub id; without a dtype, as stored."""
    return TransformersBackbone.from_pretrained(
        name,
        trust_remote_code=trusted or hub.trusts(name),
        dtype=place.dtype or "auto",
        device=place.device,
        cache_dir=hub.cache_dir,
        local_files_only=hub.local_files_only,
        **options,
    )


def _read_foreign_level(
    checkpoint: Checkpoint, level: Level, other: Source | None, hub: Hub, place: Place
) -> Backbone:
    """Load the backbone of a level by transformers; raise a ValueError for another than the checkpoint's."""
    exact = place._replace(dtype=place.dtype or torch.float32)
    backbone: Backbone
    if other is not None:
        backbone = load_backbone(other, hub, level.name, place)
    elif level.reference is not None:
        backbone = _read_foreign(level.reference.repo, hub, exact, revision=level.reference.revision)
    else:
        folder = checkpoint.find_backbone(level, None, hub).place
        backbone = _read_foreign(folder, hub, place, trusted=hub.trusts(checkpoint.name))
    _require_same(level, backbone.level(level.name))
    return backbone


def _require_same(level: Level, found: Level) -> None:
    """Raise a ValueError for a backbone that is not as its level; for a bare name, only the width counts."""
    is_name_alone = level.num_layers is None
    tokens = {each.facts["tokenizer"] for each in (level, found) if "tokenizer" in each.facts}
    if len(tokens) > 1 and not is_name_alone:
        raise ValueError(
            f"expected the tokenizer that level {level.name} was made with, got one that makes other tokens"
        )
    same = is_name_alone or replace(found, reference=None) == replace(level, reference=None)
    if found.width != level.width or not same:
        raise ValueError(f"expected a backbone of shape {level}, got {found}")


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
    foreign = {name: each for name, each in chain.backbones.items() if isinstance(each, TransformersBackbone)}
    tensors = {each: backbone.tensors() for each, backbone in chain.backbones.items()}
    levels = chain.config.levels
    for each, state in tensors.items():
        state.require_plain(f"level {each}")
    for backbone in foreign.values():
        backbone.require_whole()
    if backbones == "referenced":
        for each, level in {level.backbone: level for level in levels}.items():  # the deepest of each
            require_unchanged(level, tensors[each], _stored_tensors(level, chain.backbones[each], hub))
        tensors = {}
    else:
        levels = tuple(replace(level, reference=None) for level in levels)
        (folder / CONFIG).unlink(missing_ok=True)  # so that a write that is cut off does not look whole
        for each, backbone in foreign.items():
            backbone.save(folder / BACKBONES / each)
    own = {name: state for name, state in tensors.items() if name not in foreign}
    maps = {level: StateDict(stage) for level, stage in chain.stages.items()}
    reconstruction = tensors_to_save(chain.reconstructor, chain.config)
    config = replace(chain.config, levels=levels)
    write_folder(folder, config, maps, own, name, foreign if tensors else (), reconstruction)


def _stored_tensors(level: Level, backbone: Backbone, hub: Hub) -> Mapping[str, Tensor]:
    """Read the tensors that a level's reference points to."""
    if level.reference is None:
        raise ValueError(
            f"expected a backbone that came from the Hub at level {level.name}, got one from elsewhere: "
            'save with backbones="included"'
        )
    if isinstance(backbone, TransformersBackbone):
        there, runs_here = level.reference, backbone.runs_code_of_files
        return _read_foreign(there.repo, hub, AS_IT_IS, trusted=runs_here, revision=there.revision).tensors()
    return read_backbone(find_backbone(level.reference, hub), level)


def _convert_module(module: nn.Module, place: Place) -> nn.Module:
    """Return a module as and where it is wanted: itself, or a copy, so that the caller's stays as it is."""
    weight, (dtype, device) = next(module.parameters()), place
    if dtype in (None, weight.dtype) and (device is None or torch.device(device) == weight.device):
        return module
    return copy.deepcopy(module).to(device=device, dtype=dtype)
