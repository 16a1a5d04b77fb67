"""`RDModel`: all backbones and stages in one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rd_torch.config import ALPHABET, Level, PredictFrom, RDConfig, SpecialRows
from rd_torch.esm2 import ESM2, AttentionSink
from rd_torch.output import RDOutput
from rd_torch.packing import Packing
from rd_torch.sequences import check_tokens, is_residue
from rd_torch.stage import Stage
from rd_torch.weights import locate
from rd_torch.weights.folder import read_folder, write_folder


class RDModel(nn.Module):
    """A family of ESM-2 backbones and the stages that nest their embeddings.

    Every prefix of the embedding that ends at a level's width is, to the bit, the embedding of the
    chain that ends there (reverse distillation: Catrina et al., ICLR 2026, arXiv 2603.07710).

    Args:
        backbones: the family by level name, smallest first: `rd_torch.ESM2` modules or `esm.ESM2`
            objects, whose tensors are shared, not copied. Their language-model and contact heads
            are frozen; everything else stays as trainable as it is.
        stages: one stage fewer than backbones, as `solve_stages` returns them; kept in float32
            (in float64 where the backbones are).
        predict_from: what the stages' W acts on, the nested embedding or the previous raw one.
        special_rows: what stands at `<cls>`, `<eos>`, `<mask>` in the widest returned level: the
            rows of the maps, or the larger backbone's own (as the published implementation has it).
        provenance: where backbones and maps come from; saved with the model.

    Raises:
        ValueError: when stages and backbones do not fit together.
        TypeError: for a backbone of another kind.
    """

    alphabet = ALPHABET
    alphabet_size = len(ALPHABET)
    padding_idx = ALPHABET.padding_idx
    mask_idx = ALPHABET.mask_idx
    cls_idx = ALPHABET.cls_idx
    eos_idx = ALPHABET.eos_idx
    prepend_bos = ALPHABET.prepend_bos
    append_eos = ALPHABET.append_eos

    def __init__(
        self,
        backbones: Mapping[str, nn.Module],
        stages: Sequence[Stage],
        *,
        predict_from: PredictFrom = "nested",
        special_rows: SpecialRows = "maps",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        family = {name: ESM2.sharing(module) for name, module in backbones.items()}
        for backbone in family.values():
            backbone.freeze_heads()
        self.config = RDConfig(
            levels=tuple(
                Level(name, backbone.num_layers, backbone.embed_dim, backbone.attention_heads)
                for name, backbone in family.items()
            ),
            added=tuple(stage.added for stage in stages),
            explained=tuple(stage.explained for stage in stages),
            predict_from=predict_from,
            special_rows=special_rows,
            provenance=dict(provenance or {}),
        )
        for (name, shapes), stage in zip(self.config.map_shapes.items(), stages, strict=True):
            if tuple(stage.W.shape) != shapes["W"]:
                raise ValueError(
                    f"expected W of shape {shapes['W']} in the stage that leads to {name}, "
                    f"got {tuple(stage.W.shape)}"
                )
        dtype = torch.promote_types(next(iter(family.values())).embed_tokens.weight.dtype, torch.float32)
        self.backbones = nn.ModuleDict(family)
        self.stages = nn.ModuleDict(
            {
                level.name: stage if stage.W.dtype == dtype else copy.deepcopy(stage).to(dtype)
                for level, stage in zip(self.config.levels[1:], stages, strict=True)
            }
        )

    @property
    def embed_dim(self) -> int:
        """Width of the whole nested embedding."""
        return self.config.widths[self.config.levels[-1].name]

    @property
    def num_layers(self) -> int:
        """Layers of the largest backbone."""
        return self.config.levels[-1].num_layers

    @property
    def attention_heads(self) -> int:
        """Attention heads a layer of the largest backbone."""
        return self.config.levels[-1].attention_heads

    def forward(
        self,
        tokens: Tensor,
        repr_layers: Sequence[int] | None = None,
        need_head_weights: bool = False,
        return_contacts: bool = False,
        *,
        width: int | None = None,
    ) -> RDOutput:
        """Nested embeddings of padded token ids.

        Args:
            tokens: `(batch, time)` integer ids of fair-esm's alphabet; `<pad>` is id 1.
            repr_layers: for code written for fair-esm: `[num_layers]` or nothing. Hidden layers
                have no reverse-distilled form.
            need_head_weights: return attention maps of the largest backbone that runs.
            return_contacts: return its contact probabilities, and the attention maps.
            width: features to return; backbones above the level that holds them do not run.

        Returns:
            An `RDOutput`; a batch without rows gives empty tensors.

        Raises:
            TypeError: for tokens that are no integers.
            ValueError: for tokens of another rank or unknown ids, a layer that has no reverse-distilled
                form, or a width that does not exist.
        """
        self._check_layers(repr_layers)
        maps: list[Tensor] = []
        sink = maps.append if need_head_weights or return_contacts else None
        packing, raw = self._run(tokens, width, sink)
        nested = packing.unpack(self._nest(raw)[:, :width])
        *_, name = raw
        largest = self._backbone(name)
        attentions = torch.stack(maps, 1) if maps else None
        return RDOutput(
            embeddings=self._with_special_rows(nested, tokens, packing, raw[name]),
            logits=packing.unpack(largest.lm_head(raw[name])),
            residue_mask=is_residue(tokens),
            nested=nested,
            widths=tuple((name, self.config.widths[name]) for name in raw),
            num_layers=self.num_layers,
            repr_layers=None if repr_layers is None else tuple(repr_layers),
            attentions=attentions,
            contacts=largest.contact_head(tokens, attentions) if return_contacts else None,
        )

    def encode(self, tokens: Tensor, *, width: int | None = None) -> Tensor:
        """The embeddings of `forward` alone, `(batch, time, width)`, without logits: for bulk work."""
        packing, raw = self._run(tokens, width)
        nested = packing.unpack(self._nest(raw)[:, :width])
        *_, larger = raw.values()
        return self._with_special_rows(nested, tokens, packing, larger)

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Nested embeddings from raw ones that people already hold; no backbone runs.

        The whole chain is affine, so embeddings averaged over residues are welcome too.

        Args:
            embeddings: `(..., width)` raw final embeddings by level name: those of the first levels
                of the family, in any number.

        Returns:
            `(..., nested width)` in the maps' dtype.

        Raises:
            ValueError: for levels that are not the family's first, or other widths.
        """
        names = list(self.config.widths)
        run = names[: len(embeddings)]
        if not run or set(run) != set(embeddings):
            raise ValueError(f"expected the first levels of {', '.join(names)}, got {', '.join(embeddings)}")
        for level in self.config.levels[: len(run)]:
            got = embeddings[level.name].shape[-1]
            if got != level.width:
                raise ValueError(f"expected width {level.width} at level {level.name}, got {got}")
        return self._nest({name: embeddings[name] for name in run})

    def predict_contacts(self, tokens: Tensor) -> Tensor:
        """Contact probabilities of the largest backbone, `(batch, residues, residues)`."""
        return self(tokens, return_contacts=True).contacts

    def truncate(self, level: str) -> RDModel:
        """The chain that ends at `level`: the same modules, without the ones above it.

        Raises:
            ValueError: for a level that is not there.
        """
        names = list(self.config.widths)
        self.config.require_level(level)
        run = names[: names.index(level) + 1]
        return RDModel(
            {name: self.backbones[name] for name in run},
            [self._stage(name) for name in run[1:]],
            predict_from=self.config.predict_from,
            special_rows=self.config.special_rows,
            provenance=self.config.provenance,
        ).train(self.training)

    def freeze_backbones(self) -> RDModel:
        """Stops all backbones from training; the maps are frozen already."""
        self.backbones.requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        level: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RDModel:
        """Loads a checkpoint: a folder, the name of a shipped one, or a Hub id. Returns it in `eval` mode.

        Args:
            name_or_folder: where it is; `"esm2-rd-mini"` comes with the package.
            level: the level to end at; nothing above it is read.
            dtype: the backbones' dtype; the maps stay in float32 (float64 if that is asked).
            device: where the model goes.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that is not there.
            ValueError: for a file that is truncated or does not match, or an unknown level.
        """
        config, maps, weights = read_folder(locate(name_or_folder), level)
        backbones = {level.name: ESM2.from_tensors(level, weights[level.name]) for level in config.levels}
        stages = [
            Stage(**maps[level.name], explained=explained)
            for level, explained in zip(config.levels[1:], config.explained, strict=True)
        ]
        model = cls(
            backbones,
            stages,
            predict_from=config.predict_from,
            special_rows=config.special_rows,
            provenance=config.provenance,
        )
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config, maps and backbones to a folder that `from_pretrained` reads to the bit."""
        write_folder(
            Path(folder),
            self.config,
            {name: dict(stage.named_buffers()) for name, stage in self.stages.items()},
            {name: self._backbone(name).tensors() for name in self.backbones},
        )

    def _backbone(self, level: str) -> ESM2:
        return cast(ESM2, self.backbones[level])

    def _stage(self, level: str) -> Stage:
        return cast(Stage, self.stages[level])

    def _run(
        self, tokens: Tensor, width: int | None, sink: AttentionSink | None = None
    ) -> tuple[Packing, dict[str, Tensor]]:
        """The batch's packing, and the packed raw embeddings of the levels that hold `width` features."""
        names = self.config.levels_for(width)
        check_tokens(tokens)
        packing = Packing.of(tokens != self.padding_idx)
        sinks = dict.fromkeys(names[:-1]) | {names[-1]: sink}
        return packing, {name: self._backbone(name)(tokens, packing, sinks[name]) for name in names}

    def _nest(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Runs the stages over raw embeddings, smallest first."""
        (_, previous), *rest = raw.items()
        nested = previous.to(torch.promote_types(previous.dtype, torch.float32))
        for name, larger in rest:
            source = previous if self.config.predict_from == "previous" else None
            nested = self.stages[name](nested, larger, source)
            previous = larger
        return nested

    def _with_special_rows(self, nested: Tensor, tokens: Tensor, packing: Packing, larger: Tensor) -> Tensor:
        """The padded nested embeddings, with special rows replaced where the checkpoint wants that."""
        if self.config.special_rows == "maps":
            return nested
        special = packing.real & ~is_residue(tokens)
        own = packing.unpack(larger)[..., : nested.shape[-1]].to(nested.dtype)
        return torch.where(special[..., None], own, nested)

    def _check_layers(self, repr_layers: Sequence[int] | None) -> None:
        """Raises a ValueError for hidden layers, which have no reverse-distilled form."""
        others = [layer for layer in repr_layers or () if layer != self.num_layers]
        if others:
            raise ValueError(
                f"expected repr_layers [{self.num_layers}] or none, got {list(repr_layers or ())}: only "
                "the last layer has a reverse-distilled form; ask model.backbones for hidden layers"
            )
