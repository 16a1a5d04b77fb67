"""`Nesting`: a chain's config and maps without its backbones, for raw embeddings that people already hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from rd_torch.config import RDConfig
from rd_torch.placement import plain_parts
from rd_torch.stage import STAGES, Maps, nest
from rd_torch.weights import Checkpoint, PublishedOptions, read_checkpoint


@dataclass(frozen=True)
class Nesting:
    """Nests raw embeddings of a family's backbones; no backbone is needed, or loaded.

    Attributes:
        config: the family's levels and choices.
        stages: by the level that each leads to.
        name: what the user called the checkpoint.
    """

    config: RDConfig
    stages: nn.ModuleDict
    name: str = ""

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, level: str | None = None, **published: Unpack[PublishedOptions]
    ) -> Nesting:
        """Reads config and maps of a checkpoint, wherever its backbones lie.

        Args:
            name_or_folder: as in `RDModel.from_pretrained`.
            level: the level to end at; the authors' maps need one.
            **published: which of the authors' maps.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that is not there.
            ValueError: for a file that does not read or fit, or an unknown level or option.
        """
        checkpoint = read_checkpoint(name_or_folder, level, **published)
        return cls(checkpoint.config, nn.ModuleDict(stages_of(checkpoint)), str(name_or_folder))

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Nested embeddings from raw ones.

        The whole chain is affine, so embeddings averaged over residues are welcome too.

        Args:
            embeddings: `(..., width)` raw final embeddings by level name: those of the first levels
                of the family, in any number.

        Returns:
            `(..., nested width)` in the maps' dtype.

        Raises:
            ValueError: for levels that are not the family's first, or other widths.
        """
        levels = self.config.first_levels(embeddings)
        for level in self.config.levels[: len(levels)]:
            got = embeddings[level.name].shape[-1]
            if got != level.width:
                raise ValueError(f"expected width {level.width} at level {level.name}, got {got}")
        raw = {name: embeddings[name] for name in levels}
        return nest(raw, self.stages, self.config.predict_from)[levels[-1]]

    def until(self, level: str) -> Nesting:
        """The same up to `level`; the stages are shared."""
        config = self.config.until(level)
        return Nesting(
            config, nn.ModuleDict({name: self.stages[name] for name in config.map_shapes}), self.name
        )

    def fingerprint(self) -> str:
        """A digest of shapes, choices and every number of the maps."""
        return fingerprint(
            self.config, {f"stages.{name}": part for name, part in self.stages.state_dict().items()}
        )


def stages_of(checkpoint: Checkpoint) -> dict[str, Maps]:
    """The stages of a checkpoint by the level that they lead to."""
    config = checkpoint.config
    return {
        level.name: STAGES[config.method](**checkpoint.maps[level.name], explained=explained)
        for level, explained in zip(config.levels[1:], config.explained, strict=True)
    }


def fingerprint(config: RDConfig, tensors: Mapping[str, Tensor]) -> str:
    """A digest of what embeddings depend on: shapes, choices and every number of the tensors."""
    heads = [level.attention_heads for level in config.levels]
    return digest_of((config.method, config.predict_from, config.special_rows, config.widths, heads), tensors)


def digest_of(facts: object, tensors: Mapping[str, Tensor]) -> str:
    """A digest of facts, as JSON takes them, and every number of the tensors."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(tensors):
        for part, tensor in plain_parts(name, tensors[name]):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()[:32]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers, for digests."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
