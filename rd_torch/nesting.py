"""`Nesting`: the config and maps of a chain, for people who hold raw embeddings and need no backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from rd_torch.config import RDConfig
from rd_torch.maps import Maps
from rd_torch.modules import Modules, StateDict, digest_of, modules_of
from rd_torch.reconstruct import Reconstruction, Reconstructor, reconstruct_by_maps, tensors_to_save
from rd_torch.stage import nest, stages_of
from rd_torch.weights import PublishedOptions, read_checkpoint, require_no_backbones, write_folder


@dataclass(frozen=True)
class Nesting:
    """The config and maps of a chain, which nest raw embeddings. No backbone is loaded.

    Attributes:
        config: levels and choices of the chain.
        stages: the stages, by the level that each leads to; the basis by the first level, if there is one.
        name: name or path by which the user asked for the checkpoint.
        reconstructor: what raw embeddings are reconstructed from; None where only the maps are known.

    Examples:
        >>> nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini", level="90K")
        >>> raw = {"28K": torch.zeros(10, 32), "90K": torch.zeros(10, 48)}  # means of ten proteins
        >>> nesting.combine(raw).shape
        torch.Size([10, 48])
    """

    config: RDConfig
    stages: Modules[Maps]
    name: str = ""
    reconstructor: Reconstructor | None = field(default=None, compare=False, repr=False)

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
        return cls(checkpoint.config, modules_of(stages), str(name_or_folder), checkpoint.reconstructor)

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
        reconstruction = tensors_to_save(self.reconstructor, self.config)
        name = name or place.resolve().name
        write_folder(place, self.config, maps, {}, name, reconstruction=reconstruction)

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

    def reconstruct(self, nested: Tensor, level: str) -> Reconstruction:
        """Estimate a backbone's raw embedding from the first features of a nested one.

        The estimate is the best linear one on the data that the chain was fitted on, for any number of
        features: fewer than the level has, more, or a number inside a level. Whoever stored 640 features
        learns what was lost. The estimate is affine, so that averages over residues may be given too; the R^2
        is that of what the chain was fitted on, residues as a rule.

        Checkpoints that hold maps alone, such as the authors', give the estimate without its R^2, from as
        many features as the first level has.

        Args:
            nested: `(..., k)` first features of the chain's nested embedding, for any k from 1 to all.
            level: name of the level whose backbone's embedding is wanted.

        Returns:
            `embedding`, `(..., width of the backbone)` in float32 or the dtype of `nested`; and `r2`, the
            share of its variance that is expected to be right.

        Raises:
            ValueError: for a level or a width that the chain does not have; and, where a checkpoint holds
                maps alone, if the estimate does not follow from them.

        Examples:
            >>> nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini")
            >>> embedding, r2 = nesting.reconstruct(torch.zeros(10, 64), "1M")
            >>> embedding.shape, f"{r2:.2f}"
            (torch.Size([10, 128]), '0.83')
        """
        self.config.require_level(level)
        self.config.require_width(nested.shape[-1])
        if self.reconstructor is not None and self.reconstructor.is_known:
            return self.reconstructor.estimate(nested, level)
        return reconstruct_by_maps(nested, level, self.config, self.stages)

    def until(self, level: str) -> Nesting:
        """Return the part of this chain that ends at `level`; stages are shared, not copied."""
        config = self.config.until(level)
        stages = {name: self.stages[name] for name in config.widths if name in self.stages}
        return Nesting(config, modules_of(stages), self.name, self.reconstructor)

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
    if config.hidden_norm is False:
        facts.append("without final norm")
    if config.has_basis:
        facts.append(config.basis)
    return digest_of(facts, tensors)
