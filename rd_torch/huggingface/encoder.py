"""`TransformersEncoder`: a chain that is called as transformers' `EsmModel` is."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, EsmTokenizer, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.huggingface.standing import Standing
from rd_torch.model import RDModel

NOT_HERE: Final = {
    "inputs_embeds": "every backbone has embeddings of its own: pass ids, or distributions in their place",
    "encoder_hidden_states": "a chain is an encoder and has no decoder",
    "encoder_attention_mask": "a chain is an encoder and has no decoder",
    "past_key_values": "a chain is an encoder, which keeps nothing from call to call",
    "use_cache": "a chain is an encoder, which keeps nothing from call to call",
    "head_mask": "attention heads cannot be left out",
    "output_hidden_states": "only last layers have a reverse-distilled form: ask backbones for hidden ones",
}
"""Arguments of transformers' encoders that cannot be given here, and why."""


class TransformersEncoder(Standing):
    """A chain that is called as transformers' `EsmModel` is.

    Args:
        model: what runs, whose parameters are shared; or a config, for a chain without numbers.
        **options: of the config.

    Attributes:
        config: `hidden_size`, `vocab_size`, `num_hidden_layers`, `num_attention_heads`, `pad_token_id` and
            whatever else a config of transformers has.
        model: the `RDModel`.
    """

    def __init__(self, model: RDModel | RDTransformersConfig, **options: Any) -> None:
        if isinstance(model, RDTransformersConfig):
            super().__init__(model)
            self.model = model.empty_chain()
        else:
            super().__init__(RDTransformersConfig.of(model, **options))
            self.model = model
        self.post_init()

    def forward(  # noqa: PLR0913, PLR0917  # mirrors transformers' own
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Nested embeddings of token ids, padding on whichever side.

        Args:
            input_ids: `(batch, time)` ids of `AutoTokenizer` for ESM-2, which are fair-esm's; or soft
                sequences, `(batch, time, 33)` distributions over the alphabet.
            attention_mask: `(batch, time)` 0 at padding; without one, `<pad>` is padding.
            position_ids: the columns, 0, 1, 2, ..., or nothing.
            head_mask: nothing, and so are the others up to `use_cache`.
            inputs_embeds: nothing.
            encoder_hidden_states: nothing.
            encoder_attention_mask: nothing.
            past_key_values: nothing.
            use_cache: nothing.
            output_attentions: whether to return the attention maps of the largest backbone.
            output_hidden_states: nothing, for hidden layers have no reverse-distilled form.
            return_dict: false for a tuple.

        Returns:
            `last_hidden_state`, `(batch, time, width)`, zeros at padding; `attentions`, where asked for, one
            `(batch, heads, time, time)` a layer. There is no `pooler_output`: that of ESM-2 is not trained.

        Raises:
            TypeError: for ids that are neither integers nor distributions.
            ValueError: for ids of another rank or range, a mask of another shape, or what cannot be given.
        """
        given = {
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache or None,
            "head_mask": head_mask,
            "output_hidden_states": wanted(output_hidden_states, self.config.output_hidden_states) or None,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"expected no {name}, for {NOT_HERE[name]}")
        if input_ids is None:
            raise ValueError("expected input_ids, got none")
        _check_positions(position_ids, input_ids)
        tokens = _masked(input_ids, attention_mask, self.model.padding_idx)
        maps = None
        if wanted(output_attentions, self.config.output_attentions):
            out = self.model(tokens, need_head_weights=True)
            embeddings, maps = out.embeddings, out.attentions.unbind(1)
        else:
            embeddings = self.model.encode(tokens)
        answer = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=embeddings, attentions=maps)
        return as_asked(answer, return_dict, self.config)

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`(batch, residues, residues)` contact probabilities of the largest backbone."""
        return self.model.predict_contacts(_masked(tokens, attention_mask, self.model.padding_idx))


def wanted(asked: bool | None, otherwise: bool | None) -> bool:
    """What is asked for, or else what the config has."""
    return bool(otherwise if asked is None else asked)


def as_asked(
    answer: ModelOutput, return_dict: bool | None, config: PretrainedConfig
) -> ModelOutput | tuple[Any, ...]:
    """The output itself, or as a tuple."""
    as_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return answer if as_dict else answer.to_tuple()


def _check_positions(positions: Tensor | None, ids: Tensor) -> None:
    """Raises a ValueError for other positions than columns."""
    if positions is not None:
        columns = torch.arange(ids.shape[1], device=positions.device)
        if positions.shape[-1:] != columns.shape or bool((positions != columns).any()):
            raise ValueError("expected position_ids of the columns, 0, 1, 2, ..., or none, got others")


def _masked(ids: Tensor, mask: Tensor | None, padding_idx: int) -> Tensor:
    """The ids, or distributions, with `<pad>` where the mask has 0."""
    if mask is None:
        return ids
    if mask.shape != ids.shape[:2]:
        shape = tuple(ids.shape[:2])
        raise ValueError(f"expected an attention_mask of shape {shape}, got {tuple(mask.shape)}")
    absent = mask == 0
    if not ids.is_floating_point():
        return ids.masked_fill(absent, padding_idx)
    padding = torch.zeros(ids.shape[-1], dtype=ids.dtype, device=ids.device)
    padding[padding_idx] = 1
    return torch.where(absent[..., None], padding, ids)


AutoConfig.register(RDTransformersConfig.model_type, RDTransformersConfig)
AutoTokenizer.register(RDTransformersConfig, slow_tokenizer_class=EsmTokenizer)
AutoModel.register(RDTransformersConfig, TransformersEncoder)
