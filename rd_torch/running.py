"""`Running`: the chain whose backbones run, by themselves or, on a GPU, by an engine made from them."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.backbone import AttentionSink, Packing, Prepared, check_tokens, is_real, run_backbones
from rd_torch.chain import Chain


class Running(Chain):
    """A chain that computes the raw embeddings of its levels; `RDModel` nests them."""

    _prepared: Prepared | None = None

    def prepare_inference(self) -> Self:
        """Return this same model, made fast for inference on a CUDA device, for batches of any lengths.

        From then on, in `eval` mode and without gradients, parts of layers run fused, small batches are
        replayed as CUDA graphs of a few packed sizes, and smaller backbones run beside the largest. The
        first batch of a size takes longer; nothing is compiled for it. Parameters stay shared and
        trainable; when they move or are replaced, what was derived from them is made again. On other
        devices nothing would be faster, and the model is only put in `eval` mode.

        The fast path is compared with the modules themselves on two batches of unequal lengths. Where the
        two differ by more than half precision differs from float32, a compiler is missing or fails, memory
        runs out, or the backbones hold hooks or modules of another kind (as PEFT's), the model goes on
        without it, and one warning says why. `embed`, `embed_to_store` and `rd-torch embed` call this
        themselves.
        """
        self.eval()
        if self._prepared is None or not self._prepared.is_current:
            self._prepared = None  # first, so that two engines are never in memory at once
            if hardware.has_engine(self.device):
                self._prepared = Prepared(self.family(), final_norm=self.config.final_norm)
        return self

    def _run_prepared(self, tokens: Tensor, packing: Packing, count: int) -> dict[str, Tensor] | None:
        """Return raw embeddings of the first `count` levels by the engine; None where it may not run.

        The engine is made anew if parameters have been moved or replaced.
        """
        if self._prepared is None or self.training or torch.is_grad_enabled():
            return None
        if not self._prepared.is_current:
            self.prepare_inference()
        return self._prepared(tokens, packing, count) if self._prepared else None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the engine, which reads these very tensors and no copies of them."""
        return {**super().__getstate__(), "_prepared": None}

    def _run_backbones(
        self, tokens: Tensor, width: int | None, sink: AttentionSink | None = None
    ) -> tuple[Packing, dict[str, Tensor]]:
        """Return the batch's packing, and packed raw embeddings of the levels that `width` features need."""
        family = self.family(width)
        check_tokens(tokens, self.alphabet)
        for backbone in family.values():
            backbone.require_device_of(tokens)
        packing = Packing.of(is_real(tokens, self.alphabet))
        # The engine takes ids and no distributions, builds no attention maps, and needs a token.
        plain = packing.longest and sink is None and not tokens.is_floating_point()
        raw = self._run_prepared(tokens, packing, len(family)) if plain else None
        if raw is not None:
            return packing, raw
        return packing, run_backbones(family, tokens, packing, sink, final_norm=self.config.final_norm)
