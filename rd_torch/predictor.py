"""A chain and a head as one module, which is what training loops take.

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
    """A chain and a head as one module, which is what training loops take.

    Args:
        model: an `RDModel`, bare or wrapped by PEFT. Backbones above the head's width are left out, so that
            every trainable parameter gets a gradient at every step.
        head: the head that reads the embeddings.

    Raises:
        ValueError: for a head that reads more features than the model has.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> head = rd_torch.SequenceHead(48, 1, task="regression")  # 48 features: 28K and 90K run
        >>> predictor = rd_torch.Predictor(model, head)
        >>> _, _, tokens = model.alphabet.get_batch_converter()([("one", "MQIFVK"), ("two", "MKV")])
        >>> predictor(tokens, torch.tensor([0.5, 1.5]))["loss"].backward()
        >>> predictor(tokens)["predictions"].shape
        torch.Size([2, 1])
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
        """Predict, and compute the loss where there are labels.

        Args:
            tokens: `(batch, time)` ids, or `(batch, time, 33)` distributions, as for `RDModel`.
            labels: labels as for the head's `loss`.

        Returns:
            `"predictions"` of the head and, where there are labels, `"loss"`, a scalar.

        Raises:
            ValueError: as the model and the head do.
        """
        alphabet = self.model.alphabet
        residue_mask = is_residue(token_ids(tokens, alphabet), alphabet)
        embeddings = self.model.encode(tokens, width=self.head.width)
        predictions = self.head(embeddings, residue_mask)
        if labels is None:
            return {"predictions": predictions}
        loss = self.head.loss(predictions, labels, residue_mask)
        return {"loss": loss, "predictions": predictions}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Enable gradient checkpointing in the model; training loops ask the module that they are given."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """Enable gradient checkpointing, under the name that newer versions of transformers have.

        Args:
            activation_checkpointing_kwargs: options as for `gradient_checkpointing_enable`.
            **others: options of transformers, which must have their default values.

        Raises:
            ValueError: for another value.
        """
        if others not in ({}, {"every_n_layers": 1, "offload": False}):
            raise ValueError(f"expected every layer to be checkpointed and nothing offloaded, got {others}")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)
