"""`RDModel`: all backbones and stages in one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone import (
    ESM2,
    AttentionSink,
    Packing,
    Prepared,
    at_least_float32,
    check_tokens,
    is_real,
    is_residue,
    token_ids,
)
from rd_torch.config import ALPHABET, Level, PredictFrom, RDConfig, SpecialRows
from rd_torch.loading import Pretrained
from rd_torch.nesting import Nesting
from rd_torch.output import RDOutput
from rd_torch.stage import ConcatPCA, Maps, nest
from rd_torch.training import Trainable


class RDModel(Pretrained, Trainable):
    """A family of ESM-2 backbones and the stages that nest their embeddings.

    Every prefix of the embedding that ends at a level's width is, to the bit, the embedding of the
    chain that ends there (reverse distillation: Catrina et al., ICLR 2026, arXiv 2603.07710).

    Args:
        backbones: the family by level name, smallest first: `rd_torch.ESM2` modules or `esm.ESM2`
            objects, whose tensors are shared, not copied. Their language-model and contact heads
            are frozen; everything else stays as trainable as it is.
        stages: one stage fewer than backbones, as `solve_stages` returns them, or all `ConcatPCA`, the
            baseline; kept in float32 (in float64 where the backbones are).
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
        stages: Sequence[Maps],
        *,
        predict_from: PredictFrom = "nested",
        special_rows: SpecialRows = "maps",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        family = {name: ESM2.sharing(module) for name, module in backbones.items()}
        for backbone in family.values():
            backbone.freeze_heads()
        widths = [backbone.embed_dim for backbone in family.values()][:1]
        for stage in stages:
            widths.append(stage.width_after(widths[-1]))
        self.config = RDConfig(
            levels=tuple(
                Level(name, each.num_layers, each.embed_dim, each.attention_heads, each.reference)
                for name, each in family.items()
            ),
            added=tuple(after - before for before, after in pairwise(widths)),
            explained=tuple(stage.explained for stage in stages),
            predict_from=predict_from,
            special_rows=special_rows,
            provenance=dict(provenance or {}),
            method="naive" if any(isinstance(stage, ConcatPCA) for stage in stages) else "rd",
        )
        for (name, expected), stage in zip(self.config.map_shapes.items(), stages, strict=True):
            got = {part: tuple(tensor.shape) for part, tensor in stage.named_buffers()}
            if got != expected:
                raise ValueError(f"expected {expected} in the stage that leads to {name}, got {got}")
        self._prepared: Prepared | None = None
        dtype = at_least_float32(next(iter(family.values())).dtype)
        self.backbones = nn.ModuleDict(family)
        self.stages = nn.ModuleDict(
            {
                level.name: stage if stage.dtype == dtype else copy.deepcopy(stage).to(dtype)
                for level, stage in zip(self.config.levels[1:], stages, strict=True)
            }
        )

    @property
    def embed_dim(self) -> int:
        """Width of the whole nested embedding."""
        return self.config.widths[self.config.levels[-1].name]

    @property
    def dtype(self) -> torch.dtype:
        """The backbones' dtype."""
        return next(iter(self.family().values())).dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(iter(self.family().values())).device

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
        repr_layers: Iterable[int] | None = None,
        need_head_weights: bool = False,
        return_contacts: bool = False,
        *,
        width: int | None = None,
    ) -> RDOutput:
        """Nested embeddings of padded token ids.

        Args:
            tokens: `(batch, time)` integer ids of fair-esm's alphabet, `<pad>` id 1; or soft sequences:
                `(batch, time, 33)` distributions over the alphabet, padding 1 at `<pad>`, through which
                gradients reach the sequence. What is no embedding goes by each position's likeliest id.
            repr_layers: for code written for fair-esm: `[num_layers]` or nothing. Hidden layers
                have no reverse-distilled form.
            need_head_weights: return attention maps of the largest backbone that runs.
            return_contacts: return its contact probabilities, and the attention maps.
            width: features to return; backbones above the level that holds them do not run.

        Returns:
            An `RDOutput`; a batch without rows gives empty tensors.

        Raises:
            TypeError: for tokens that are neither integer nor floating.
            ValueError: for tokens of another rank or device, unknown ids, distributions that do not sum to
                one (within 0.005), a layer without a reverse-distilled form, or a width that does not exist.
        """
        layers = self._listed(repr_layers)
        maps: list[Tensor] = []
        sink = maps.append if need_head_weights or return_contacts else None
        packing, raw = self._run(tokens, width, sink)
        levels = self._nest(raw)
        *_, name = raw
        nested = packing.unpack(levels[name][:, :width])
        separate = levels if self.config.method == "naive" else {}
        largest = cast(ESM2, self.backbones[name])
        attentions = torch.stack(maps, 1) if maps else None
        ids = token_ids(tokens)
        return RDOutput(
            embeddings=self._with_special_rows(nested, ids, packing, raw[name]),
            logits=packing.unpack(largest.logits(raw[name])) if largest.has_lm_head else None,
            residue_mask=is_residue(ids),
            nested=nested,
            widths=tuple((name, self.config.widths[name]) for name in raw),
            num_layers=self.num_layers,
            separate={level: packing.unpack(part) for level, part in separate.items()},
            repr_layers=layers,
            attentions=attentions,
            contacts=largest.contact_head(ids, attentions) if return_contacts else None,
        )

    def encode(self, tokens: Tensor, *, width: int | None = None) -> Tensor:
        """The embeddings of `forward` alone, `(batch, time, width)`, without logits: for bulk work."""
        packing, raw = self._run(tokens, width)
        *_, name = raw
        nested = packing.unpack(self._nest(raw)[name][:, :width])
        return self._with_special_rows(nested, token_ids(tokens), packing, raw[name])

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Nested embeddings, `(..., nested width)`, from raw ones that people already hold; no backbone runs.

        Arguments, result and errors as for `Nesting.combine`.
        """
        return Nesting(self.config, self.stages).combine(embeddings)

    def predict_contacts(self, tokens: Tensor) -> Tensor:
        """Contact probabilities of the largest backbone, `(batch, residues, residues)`."""
        return self(tokens, return_contacts=True).contacts

    def truncate(self, level: str) -> RDModel:
        """The chain that ends at `level`: the same modules, without the ones above it.

        Raises:
            ValueError: for a level that is not there.
        """
        self.config.require_level(level)
        names = list(self.config.widths)
        run = names[: names.index(level) + 1]
        return RDModel(
            {name: self.backbones[name] for name in run},
            [cast(Maps, self.stages[name]) for name in run[1:]],
            predict_from=self.config.predict_from,
            special_rows=self.config.special_rows,
            provenance=self.config.provenance,
        ).train(self.training)

    def family(self, width: int | None = None) -> dict[str, ESM2]:
        """The backbones that run for `width` features, by default all, smallest first.

        Raises:
            ValueError: for a width that does not exist.
        """
        return {name: cast(ESM2, self.backbones[name]) for name in self.config.levels_for(width)}

    def prepare_inference(self) -> RDModel:
        """Makes inference fast on a CUDA device, for batches of any lengths; returns the model itself.

        From then on, in `eval` mode and without gradients, backbones run fused, small batches as CUDA
        graphs of a few packed sizes, smaller backbones beside the largest. A size takes longer when it
        first comes; nothing is compiled for it. Parameters stay shared and trainable; when they move
        or are replaced, what was derived from them is made again. On other devices the model is as fast
        as it gets, and is only put in `eval` mode.

        What was made is compared with the modules themselves on two batches of unequal lengths. The model
        goes on as it was, with one warning that says why, where the two differ by more than half precision
        does from float32, a compiler is missing or fails, memory runs out, or the backbones hold hooks or
        modules of another kind (as PEFT's). `embed`, `embed_to_store` and `rd-torch embed` call this themselves.
        """
        self.eval()
        if self._prepared is None or not self._prepared.is_current:
            self._prepared = None  # gives its memory back
            if hardware.has_engine(self.device):
                self._prepared = Prepared(self.family())
        return self

    def _run_prepared(self, tokens: Tensor, packing: Packing, levels: int) -> dict[str, Tensor] | None:
        """Raw embeddings by the prepared engine, which is made anew if its parameters have gone.

        None where this call may not use it, or there is none.
        """
        if self._prepared is None or self.training or torch.is_grad_enabled():
            return None
        if not self._prepared.is_current:
            self.prepare_inference()
        return self._prepared(tokens, packing, levels) if self._prepared else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the engine, which belongs to these very tensors."""
        return {**super().__getstate__(), "_prepared": None}

    def _run(
        self, tokens: Tensor, width: int | None, sink: AttentionSink | None = None
    ) -> tuple[Packing, dict[str, Tensor]]:
        """The batch's packing, and the packed raw embeddings of the levels that hold `width` features."""
        family = self.family(width)
        check_tokens(tokens)
        for backbone in family.values():
            backbone.require_device_of(tokens)
        packing = Packing.of(is_real(tokens))
        plain = packing.longest and sink is None and not tokens.is_floating_point()
        raw = self._run_prepared(tokens, packing, len(family)) if plain else None
        if raw is not None:
            return packing, raw
        sinks = dict.fromkeys(family) | {list(family)[-1]: sink}
        return packing, {name: each(tokens, packing, sinks[name]) for name, each in family.items()}

    def _nest(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What comes out at each level, of raw embeddings, smallest first."""
        return nest(raw, self.stages, self.config.predict_from)

    def _with_special_rows(self, nested: Tensor, ids: Tensor, packing: Packing, larger: Tensor) -> Tensor:
        """The padded nested embeddings, with special rows replaced where the checkpoint wants that."""
        if self.config.special_rows == "maps":
            return nested
        special = packing.real & ~is_residue(ids)
        own = packing.unpack(larger)[..., : nested.shape[-1]].to(nested.dtype)
        return torch.where(special[..., None], own, nested)

    def _listed(self, repr_layers: Iterable[int] | None) -> tuple[int, ...] | None:
        """The layers asked for, each once; raises a ValueError for hidden ones."""
        if repr_layers is None:
            return None
        layers = tuple(dict.fromkeys(map(int, repr_layers)))
        if set(layers) - {self.num_layers}:
            raise ValueError(
                f"expected repr_layers [{self.num_layers}] or none, got {list(layers)}: only the last layer "
                "has a reverse-distilled form; ask model.backbones for hidden layers"
            )
        return layers
