"""Tasks on top of a chain, as transformers' `EsmFor...` are called."""

from __future__ import annotations

from typing import Any

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

from rd_torch.backbone import ESM2
from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.huggingface.encoder import TransformersEncoder, as_asked
from rd_torch.huggingface.standing import Fresh, Standing
from rd_torch.model import RDModel


class Task(Standing):
    """A task on top of a chain.

    Args:
        model: the chain, whose parameters are shared; or a config, for one without numbers.
        **options: of the config, such as `num_labels`.
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
        """Logits of the task, and the loss where labels come.

        Args:
            input_ids: as `TransformersEncoder` takes them, and so are the others.
            attention_mask: `(batch, time)`.
            position_ids: the columns, or nothing.
            head_mask: nothing.
            inputs_embeds: nothing.
            encoder_hidden_states: nothing.
            encoder_attention_mask: nothing.
            labels: as the task has them.
            output_attentions: whether to return the attention maps of the largest backbone.
            output_hidden_states: nothing.
            return_dict: false for a tuple.

        Returns:
            `loss`, `logits` and `attentions`, as far as they are asked for.
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
        return as_asked(answer, return_dict, self.config)

    def predicted(self, embeddings: Tensor) -> Tensor:
        """Logits of `(batch, time, width)` embeddings."""
        raise NotImplementedError

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of `(batch, time, classes)` logits, without labels of -100."""
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`(batch, residues, residues)` contact probabilities of the largest backbone."""
        return self.esm.predict_contacts(tokens, attention_mask)


class ClassificationHead(nn.Module):
    """Two linear layers on the embedding of `<cls>`, under the names of transformers' own head."""

    def __init__(self, config: RDTransformersConfig) -> None:
        super().__init__()
        self.dense = Fresh(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = Fresh(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, time, width)` to `(batch, labels)`."""
        hidden = torch.tanh(self.dense(self.dropout(features[:, 0])))
        return self.out_proj(self.dropout(hidden))


class TransformersForSequenceClassification(Task):
    """A chain with a head on the embedding of `<cls>`, in place of `EsmForSequenceClassification`.

    The loss is that of the config's `problem_type`. Without one it follows from the first labels: one number
    a sequence is regression, integers are a class each, several numbers several classes at once.

    Args:
        model: the chain, whose parameters are shared; or a config, for one without numbers.
        **options: of the config, such as `num_labels`.
    """

    answer = SequenceClassifierOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(model, **options)
        self.classifier = ClassificationHead(self.config)
        self.post_init()

    def predicted(self, embeddings: Tensor) -> Tensor:
        """`(batch, labels)`."""
        return self.classifier(embeddings)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of `(batch,)` or `(batch, labels)` labels."""
        if self.config.problem_type is None:
            one_each = not labels.is_floating_point()
            several = "single_label_classification" if one_each else "multi_label_classification"
            self.config.problem_type = "regression" if self.num_labels == 1 else several
        if self.config.problem_type == "regression":
            return functional.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        if self.config.problem_type == "single_label_classification":
            return functional.cross_entropy(logits, labels.view(-1))
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class TransformersForTokenClassification(Task):
    """A chain with a head on every token, in place of `EsmForTokenClassification`.

    Args:
        model: the chain, whose parameters are shared; or a config, for one without numbers.
        **options: of the config, such as `num_labels`.
    """

    answer = TokenClassifierOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(model, **options)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.classifier = Fresh(self.config.hidden_size, self.config.num_labels)
        self.post_init()

    def predicted(self, embeddings: Tensor) -> Tensor:
        """`(batch, time, labels)`."""
        return self.classifier(self.dropout(embeddings))


class TransformersForMaskedLM(Task):
    """The largest backbone of a chain with its language-model head, in place of `EsmForMaskedLM`.

    Letters are predicted by one backbone: the smaller ones are left out. The head trains.

    Args:
        model: the chain, whose parameters are shared; or a config, for one without numbers.
        **options: of the config.

    Raises:
        ValueError: for a backbone whose checkpoint has no language-model head.
    """

    answer = MaskedLMOutput

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        super().__init__(_largest(model) if isinstance(model, RDModel) else model, **options)
        if not self._backbone.has_lm_head:
            raise ValueError("expected a backbone with a language-model head, got one without")
        self._backbone.lm_head.requires_grad_(True)
        self.post_init()

    @property
    def _backbone(self) -> ESM2:
        (backbone,) = self.chain.backbones.values()
        return backbone

    def predicted(self, embeddings: Tensor) -> Tensor:
        """`(batch, time, 33)`."""
        return self._backbone.logits(embeddings)


def _largest(model: RDModel) -> RDModel:
    """The largest backbone as a chain of one."""
    *_, level = model.backbones
    return RDModel({level: model.backbones[level]}, []).train(model.training)


AutoModelForSequenceClassification.register(RDTransformersConfig, TransformersForSequenceClassification)
AutoModelForTokenClassification.register(RDTransformersConfig, TransformersForTokenClassification)
AutoModelForMaskedLM.register(RDTransformersConfig, TransformersForMaskedLM)
