"""Models for tasks on top of a chain, which are called as transformers' `EsmFor...` are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

from rd_torch.backbone import Encoder
from rd_torch.huggingface.base import ChainModel, HeadLinear
from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.huggingface.encoder import TransformersEncoder, as_dict_or_tuple
from rd_torch.model import RDModel


class TaskModel(ChainModel):
    """The base class of models for a task on top of a chain.

    Args:
        model: the chain, whose parameters are shared; or a config, for a chain that has no weights yet.
        **options: options of `RDTransformersConfig`, such as `num_labels`.
    """

    answer: type[ModelOutput]

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        encoder = TransformersEncoder(model, **options)
        super().__init__(encoder.config)
        self.num_labels = self.config.num_labels
        self.esm = encoder

    def forward(  # noqa: PLR0913, PLR0917  # mirrors transformers' own
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Predict the task's logits, and compute the loss where there are labels.

        Args:
            input_ids: `(batch, time)` ids, or `(batch, time, 33)` distributions, as for
                `TransformersEncoder`.
            attention_mask: `(batch, time)`, 0 at padding; without a mask, `<pad>` is padding.
            position_ids: the numbers of the columns, 0, 1, 2, ..., or None.
            head_mask: must be None.
            inputs_embeds: must be None.
            encoder_hidden_states: must be None.
            encoder_attention_mask: must be None.
            labels: `(batch,)` or `(batch, labels)` for whole sequences, `(batch, time)` for tokens; -100
                where a class is not known.
            output_attentions: whether to return the attention maps of the largest backbone.
            output_hidden_states: must be false or None.
            return_dict: whether to return an object with named outputs, not a tuple; by default what the
                config says.

        Returns:
            `logits`; `loss`, where there are labels; `attentions`, where they were asked for.
        """
        out = self.esm(
            input_ids,
            attention_mask,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.predicted(out.last_hidden_state)
        loss = None if labels is None else self.loss_of(logits, labels.to(logits.device))
        answer = self.answer(loss=loss, logits=logits, attentions=out.attentions)
        return as_dict_or_tuple(answer, return_dict, self.config)

    def predicted(self, embeddings: Tensor) -> Tensor:
        """Return the logits of `(batch, time, width)` embeddings."""
        raise NotImplementedError

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of `(batch, time, classes)` logits, but for labels of -100."""
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict contacts with the largest backbone.

        Args:
            tokens: `(batch, time)` ids.
            attention_mask: `(batch, time)`, 0 at padding; without a mask, `<pad>` is padding.

        Returns:
            `(batch, residues, residues)` probabilities.
        """
        return self.esm.predict_contacts(tokens, attention_mask)


class ClassificationHead(nn.Module):
    """Two linear layers on the embedding of `<cls>`, under the names of transformers' own head."""

    def __init__(self, config: RDTransformersConfig) -> None:
        super().__init__()
        self.dense = HeadLinear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = HeadLinear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, time, width)` embeddings to `(batch, labels)` logits."""
        hidden = torch.tanh(self.dense(self.dropout(features[:, 0])))
        return self.out_proj(self.dropout(hidden))


class TransformersForSequenceClassification(TaskModel):
    """A chain with a head on the embedding of `<cls>`, in place of `EsmForSequenceClassification`.

    The config's `problem_type` says which loss is taken. Without one, the first labels decide: with
    `num_labels=1` it is regression, with integers one class for each sequence, and with other numbers several
    classes at once.

    Args:
        model: the chain, whose parameters are shared; or a config, for a chain that has no weights yet.
        **options: options of `RDTransformersConfig`, such as `num_labels`.

    Examples:
        >>> classes = rd_torch.TransformersForSequenceClassification
        >>> classifier = classes.from_pretrained("esm2-rd-mini", num_labels=2)
        >>> tokens = torch.tensor([[0, 20, 15, 7, 2]])  # <cls> M K V <eos>
        >>> out = classifier(input_ids=tokens, labels=torch.tensor([1]))
        >>> out.logits.shape, out.loss.shape
        (torch.Size([1, 2]), torch.Size([]))
    """

    answer = SequenceClassifierOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(model, **options)
        self.classifier = ClassificationHead(self.config)
        self.post_init()

    def predicted(self, embeddings: Tensor) -> Tensor:
        """Return `(batch, labels)` logits."""
        return self.classifier(embeddings)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss for `(batch,)` or `(batch, labels)` labels."""
        if self.config.problem_type is None:
            one_each = not labels.is_floating_point()
            several = "single_label_classification" if one_each else "multi_label_classification"
            self.config.problem_type = "regression" if self.num_labels == 1 else several
        if self.config.problem_type == "regression":
            return functional.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        if self.config.problem_type == "single_label_classification":
            return functional.cross_entropy(logits, labels.view(-1))
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class TransformersForTokenClassification(TaskModel):
    """A chain with a head on every token, in place of `EsmForTokenClassification`.

    Args:
        model: the chain, whose parameters are shared; or a config, for a chain that has no weights yet.
        **options: options of `RDTransformersConfig`, such as `num_labels`.

    Examples:
        >>> classes = rd_torch.TransformersForTokenClassification
        >>> tagger = classes.from_pretrained("esm2-rd-mini", num_labels=3)
        >>> tokens = torch.tensor([[0, 20, 15, 7, 2]])  # <cls> M K V <eos>
        >>> labels = torch.tensor([[-100, 0, 2, 1, -100]])
        >>> tagger(input_ids=tokens, labels=labels).logits.shape
        torch.Size([1, 5, 3])
    """

    answer = TokenClassifierOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(model, **options)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.classifier = HeadLinear(self.config.hidden_size, self.config.num_labels)
        self.post_init()

    def predicted(self, embeddings: Tensor) -> Tensor:
        """Return `(batch, time, labels)` logits."""
        return self.classifier(self.dropout(embeddings))


class TransformersForMaskedLM(TaskModel):
    """The largest backbone of a chain with its language-model head, in place of `EsmForMaskedLM`.

    One backbone predicts the letters, and the smaller ones are left out. Its head is trainable.

    Args:
        model: the chain, whose parameters are shared; or a config, for a chain that has no weights yet.
        **options: options of `RDTransformersConfig`.

    Raises:
        ValueError: for a backbone whose checkpoint has no language-model head.

    Examples:
        >>> model = rd_torch.TransformersForMaskedLM.from_pretrained("esm2-rd-mini")
        >>> tokens = torch.tensor([[0, 20, 32, 7, 2]])  # <cls> M <mask> V <eos>
        >>> model(input_ids=tokens).logits.shape
        torch.Size([1, 5, 33])
    """

    answer = MaskedLMOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(_largest(model) if isinstance(model, RDModel) else model, **options)
        if not self._backbone.has_lm_head:
            raise ValueError("expected a backbone with a language-model head, got one without")
        self._backbone.lm_head.requires_grad_(True)
        self.post_init()

    @property
    def _backbone(self) -> Encoder:
        (backbone,) = self.chain.backbones.values()
        return cast(Encoder, backbone)

    def predicted(self, embeddings: Tensor) -> Tensor:
        """Return `(batch, time, 33)` logits."""
        return cast(Tensor, self._backbone.logits(embeddings))


def _largest(model: RDModel) -> RDModel:
    """Return the largest backbone as a chain of one level."""
    level, backbone = list(model.family().items())[-1]
    return RDModel({level: backbone}, []).train(model.training)


AutoModelForSequenceClassification.register(RDTransformersConfig, TransformersForSequenceClassification)
AutoModelForTokenClassification.register(RDTransformersConfig, TransformersForTokenClassification)
AutoModelForMaskedLM.register(RDTransformersConfig, TransformersForMaskedLM)
