"""`Nesting`: a chain's config and maps without its backbones, for raw embeddings that people already hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from torch import Tensor

from rd_torch.config import RDConfig
from rd_torch.modules import Modules, StateDict, digest_of, modules_of
from rd_torch.stage import Maps, nest, stages_of
from rd_torch.weights import PublishedOptions, read_checkpoint


@dataclass(frozen=True)
class Nesting:
    """Nests raw embeddings of a family's backbones; no backbone is needed, or loaded.

    Attributes:
        config: the family's levels and choices.
        stages: by the level that each leads to.
        name: what the user called the checkpoint.

    Examples:
        >>> nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini", level="90K")
        >>> raw = {"28K": torch.zeros(10, 32), "90K": torch.zeros(10, 48)}  # means of ten proteins
        >>> nesting.combine(raw).shape
        torch.Size([10, 48])
    """

    config: RDConfig
    stages: Modules[Maps]
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
        stages = stages_of(checkpoint.config, checkpoint.maps)
        return cls(checkpoint.config, modules_of(stages), str(name_or_folder))

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
        stages = {level.name: self.stages[level.name] for level in config.levels[1:]}
        return Nesting(config, modules_of(stages), self.name)

    def fingerprint(self) -> str:
        """A digest of shapes, choices and every number of the maps."""
        return fingerprint(self.config, {"stages.": StateDict(self.stages)})


def fingerprint(config: RDConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Digests what embeddings depend on: shapes, choices and every number of the tensors.

    Args:
        config: the chain's.
        tensors: state dicts by what stands before their names.
    """
    heads = [level.attention_heads for level in config.levels]
    return digest_of((config.method, config.predict_from, config.special_rows, config.widths, heads), tensors)
