"""`Nesting`: the config and maps of a chain, for people who hold raw embeddings and need no backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from rd_torch.config import RDConfig
from rd_torch.modules import Modules, StateDict, digest_of, modules_of
from rd_torch.stage import Maps, nest, stages_of
from rd_torch.weights import PublishedOptions, read_checkpoint, require_no_backbones, write_folder


@dataclass(frozen=True)
class Nesting:
    """The config and maps of a chain, which nest raw embeddings. No backbone is loaded.

    Attributes:
        config: levels and choices of the chain.
        stages: the stages, by the level that each leads to.
        name: name or path by which the user asked for the checkpoint.

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
        """Read the config and maps of a checkpoint, wherever its backbones lie.

        Args:
            name_or_folder: the checkpoint, as in `RDModel.from_pretrained`.
            level: name of the level at which the chain ends; by default the last. The authors' maps need one.
            **published: which of the authors' maps to read: `method`, `regressor`, `pca`, `sequences`,
                `predict_from` and `special_rows`, as in `RDModel.from_pretrained`.

        Returns:
            The config and maps.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that is not there.
            ValueError: for a file that cannot be read or does not fit, or an unknown level or option.
        """
        checkpoint = read_checkpoint(name_or_folder, level, **published)
        stages = stages_of(checkpoint.config, checkpoint.maps)
        return cls(checkpoint.config, modules_of(stages), str(name_or_folder))

    def save_pretrained(self, folder: str | Path, *, name: str | None = None) -> None:
        """Write config, maps and model card to a folder, for `from_pretrained` to read to the bit.

        No backbone is written. `RDModel.from_pretrained` needs `backbones=` to load what is not on the Hub.

        Args:
            folder: folder to write, which is made if need be.
            name: name of the maps on the card, by default that of the folder.

        Raises:
            ValueError: for a folder that holds backbones, which would be lost.
        """
        place = Path(folder)
        require_no_backbones(place)
        maps = {level: StateDict(stage) for level, stage in self.stages.items()}
        write_folder(place, self.config, maps, {}, name or place.resolve().name)

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Nest raw embeddings.

        The chain is one affine map, so it also takes embeddings that were averaged over residues.

        Args:
            embeddings: `(..., width)` raw final embeddings of the backbones, by the name of the level: of all
                levels, or of the first few.

        Returns:
            `(..., nested width)` nested embeddings of the widest of these levels, in the maps' dtype.

        Raises:
            ValueError: for levels that are not the family's first, for other widths than their backbones', or
                for another number of rows than at the first level.
        """
        levels = self.config.first_levels(embeddings)
        rows = embeddings[levels[0]].shape[:-1]
        for level in self.config.levels[: len(levels)]:
            *others, got = embeddings[level.name].shape
            if got != level.width:
                raise ValueError(f"expected width {level.width} at level {level.name}, got {got}")
            if tuple(others) != rows:  # PyTorch would repeat a single row for all
                raise ValueError(
                    f"expected shape {(*rows, got)} at level {level.name}, as many rows as at level "
                    f"{levels[0]}, got {(*others, got)}"
                )
        raw = {name: embeddings[name] for name in levels}
        return nest(raw, self.stages, self.config.predict_from)[levels[-1]]

    def until(self, level: str) -> Nesting:
        """Return the part of this chain that ends at `level`; stages are shared, not copied."""
        config = self.config.until(level)
        stages = {level.name: self.stages[level.name] for level in config.levels[1:]}
        return Nesting(config, modules_of(stages), self.name)

    def fingerprint(self) -> str:
        """Return a digest of the shapes, the choices and every number of the maps."""
        return fingerprint(self.config, {"stages.": StateDict(self.stages)})


def fingerprint(config: RDConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return a digest of all that embeddings depend on: shapes, choices and every number of the tensors.

    Args:
        config: the config of the chain.
        tensors: state dicts, by the prefix of the names in them.
    """
    shapes = [level.architecture for level in config.levels]
    facts: list[Any] = [config.method, config.predict_from, config.special_rows, config.widths, shapes]
    if not config.final_norm and not all(level.is_last for level in config.levels):
        facts.append("without final norm")
    return digest_of(facts, tensors)
