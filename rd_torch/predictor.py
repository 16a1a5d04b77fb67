"""A chain and a head as one module, as training loops want it.

predictor = Predictor(model, SequenceHead(128, 1, task="regression"))
loss = predictor(tokens, labels)["loss"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from rd_torch.backbone import is_residue, token_ids
from rd_torch.heads import Head, MatryoshkaHead
from rd_torch.model import RDModel


class Predictor(nn.Module):
    """A chain and a head as one module, as training loops want it.

    Args:
        model: an `RDModel`, bare or wrapped by PEFT. Backbones above the head's width are left out, so that
            every parameter that can train gets a gradient at every step.
        head: what reads the embeddings.

    Raises:
        ValueError: for a head that reads more features than the model has.
    """

    model: RDModel
    head: Head | MatryoshkaHead

    def __init__(self, model: nn.Module, head: Head | MatryoshkaHead) -> None:
        super().__init__()
        chain = cast(RDModel, model)  # PEFT's wrapper hands on what it does not have itself
        if head.width > chain.embed_dim:
            raise ValueError(
                f"expected a head of at most the model's width, {chain.embed_dim}, got {head.width}"
            )
        needed = chain.config.levels_for(head.width)
        whole = len(needed) == len(chain.config.levels)
        self.model = chain if whole else chain.truncate(needed[-1])
        self.head = head

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Predictions, and the loss where labels come.

        Args:
            tokens: as `RDModel` takes them.
            labels: as the head's loss takes them.

        Returns:
            `{"loss": (), "predictions": ...}`, or without the loss.

        Raises:
            ValueError: what the model and the head raise.
        """
        residue_mask = is_residue(token_ids(tokens))
        embeddings = self.model.encode(tokens, width=self.head.width)
        predictions = self.head(embeddings, residue_mask)
        if labels is None:
            return {"predictions": predictions}
        loss = self.head.loss(predictions, labels, residue_mask)
        return {"loss": loss, "predictions": predictions}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """The model's own: training loops ask the module that they are given."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """The same under the name, and with the defaults, that newer versions of transformers have.

        Raises:
            ValueError: for other options than there are.
        """
        if others not in ({}, {"every_n_layers": 1, "offload": False}):
            raise ValueError(f"expected every layer to be checkpointed and nothing offloaded, got {others}")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)
