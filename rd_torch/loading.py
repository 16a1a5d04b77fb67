"""The door between a model and its files: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, Unpack, cast

import torch
from torch import nn

from rd_torch.backbone import ESM2
from rd_torch.config import RDConfig, Storage, check_choice
from rd_torch.nesting import fingerprint, stages_of
from rd_torch.placement import StateDict
from rd_torch.weights import (
    Hub,
    PublishedOptions,
    Source,
    Upload,
    read_checkpoint,
    require_unchanged,
    upload,
    write_folder,
)


class Pretrained(nn.Module):
    """What a model of backbones and stages needs in order to be loaded and saved."""

    config: RDConfig
    backbones: nn.ModuleDict
    stages: nn.ModuleDict

    @classmethod
    def from_pretrained(  # noqa: PLR0913, PLR0917  # mirrors transformers' own
        cls,
        name_or_folder: str | Path,
        level: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backbones: Mapping[str, Source | nn.Module] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **published: Unpack[PublishedOptions],
    ) -> Self:
        """Loads a checkpoint in `eval` mode; of everything only what `level` needs.

        Args:
            name_or_folder: a checkpoint of ours: folder, Hub id, or `"esm2-rd-mini"`, which comes with
                the package; the authors' maps: `"singhlab/plm_reverse_distillation"` or a folder that
                holds their `weights/`; or one ESM-2: file, folder or Hub id.
            level: the level to end at; the authors' maps need one.
            dtype: the backbones' dtype, by default float32, or as our checkpoint stores it; the maps
                stay in float32 (float64 if that is asked).
            device: where the model goes.
            backbones: other backbones by level: file, folder, Hub id, `Reference` or module. A module
                is shared, unless it needs another dtype or device.
            revision: of the Hub id: commit, tag or branch.
            cache_dir: the Hub's cache, by default where `HF_HOME` has it.
            local_files_only: never ask the network.
            **published: which of the authors' maps, see `PublishedOptions`.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that is not there.
            ValueError: for a file that does not read, match or fit, a checksum that differs, or an
                unknown level or option.
        """
        hub = Hub(cache_dir, local_files_only)
        checkpoint = read_checkpoint(name_or_folder, level, hub, revision, **published)
        config, others = checkpoint.config, dict(backbones or {})
        for name in others:
            config.require_level(name)
        family: dict[str, nn.Module] = {}
        for each in config.levels:
            other = others.get(each.name)
            family[each.name] = (
                _fitted(other, dtype, device)
                if isinstance(other, nn.Module)
                else ESM2.from_tensors(*checkpoint.backbone(each, other, hub, dtype=dtype, device=device))
            )
        model = cls(
            family,
            list(stages_of(checkpoint).values()),
            predict_from=config.predict_from,
            special_rows=config.special_rows,
            provenance=config.provenance,
        )
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        backbones: Storage = "included",
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        """Writes config, maps, model card and backbones to a folder that `from_pretrained` reads to the bit.

        Args:
            folder: made if need be.
            backbones: `"included"`, or `"referenced"`: Hub id, commit and checksums in place of the
                tensors, for backbones that are what came from there.
            cache_dir: the Hub's cache, where references are compared with.
            name: what the card calls the model, by default the folder.

        Raises:
            ValueError: for a reference to a backbone that came from elsewhere or was changed since, or a
                quantised one, whose weights are no plain tensors.
        """
        check_choice("backbones", backbones, ("included", "referenced"))
        tensors = {level: cast(ESM2, backbone).tensors() for level, backbone in self.backbones.items()}
        levels = self.config.levels
        for level_name, state in tensors.items():
            state.require_plain(f"level {level_name}")
        if backbones == "referenced":
            for level in levels:
                require_unchanged(level, tensors.pop(level.name), Hub(cache_dir))
        else:
            levels = tuple(replace(level, reference=None) for level in levels)
        maps = {level: StateDict(stage) for level, stage in self.stages.items()}
        write_folder(
            Path(folder),
            replace(self.config, levels=levels),
            maps,
            tensors,
            name or Path(folder).resolve().name,
        )

    def fingerprint(self) -> str:
        """A digest of what embeddings depend on: shapes, choices and every number of backbones and maps.

        Two models with the same fingerprint are the same chain in the same dtype, wherever they come from.
        """
        return fingerprint(self.config, StateDict(self, ESM2.counts))

    def push_to_hub(
        self,
        repo: str,
        *,
        backbones: Storage = "included",
        cache_dir: str | Path | None = None,
        **options: Unpack[Upload],
    ) -> str:
        """Saves to a repository of the Hub, made if need be; returns the address of the commit.

        Args:
            repo: repository id, `"name/chain"`.
            backbones: as in `save_pretrained`.
            cache_dir: as in `save_pretrained`.
            **options: `private`, `token`, `revision` (a branch) and `commit_message`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, backbones=backbones, cache_dir=cache_dir, name=repo)
            return upload(Path(folder), repo, **options)


def _fitted(module: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """The module itself, or a copy where it would have to be converted or moved."""
    weight = next(module.parameters())
    if dtype in (None, weight.dtype) and (device is None or torch.device(device) == weight.device):
        return module
    return copy.deepcopy(module).to(device=device, dtype=dtype)
