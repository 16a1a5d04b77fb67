"""`TransformersEncoder`: a chain that is called as transformers' `EsmModel` is."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, EsmTokenizer, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from rd_torch.huggingface.base import ChainModel
from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.model import RDModel

REFUSED_ARGUMENTS: Final = {
    "inputs_embeds": "every backbone has embeddings of its own: pass ids, or distributions in their place",
    "encoder_hidden_states": "a chain is an encoder and has no decoder",
    "encoder_attention_mask": "a chain is an encoder and has no decoder",
    "past_key_values": "a chain is an encoder, which keeps nothing from call to call",
    "use_cache": "a chain is an encoder, which keeps nothing from call to call",
    "head_mask": "attention heads cannot be left out",
    "output_hidden_states": "only last layers have a reverse-distilled form: ask backbones for hidden ones",
}
"""Arguments of transformers' encoders that are refused here, and why."""


class TransformersEncoder(ChainModel):
    """A chain that is called as transformers' `EsmModel` is.

    Args:
        model: the chain, whose parameters are shared; or a config, for a chain that has no weights yet.
        **options: options of `RDTransformersConfig`.

    Attributes:
        config: the `RDTransformersConfig`, with `hidden_size`, `vocab_size`, `num_hidden_layers`,
            `num_attention_heads`, `pad_token_id` and whatever else a config of transformers has.
        model: the `RDModel`.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> encoder = rd_torch.TransformersEncoder(model)
        >>> tokens = torch.tensor([[0, 20, 15, 7, 2]])  # <cls> M K V <eos>
        >>> encoder(input_ids=tokens).last_hidden_state.shape
        torch.Size([1, 5, 128])
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
        """Embed token ids, with padding at either side.

        Args:
            input_ids: `(batch, time)` ids from ESM-2's `AutoTokenizer`, which are fair-esm's; or soft
                sequences, `(batch, time, 33)` distributions over the alphabet.
            attention_mask: `(batch, time)`, 0 at padding; without a mask, `<pad>` is padding.
            position_ids: the numbers of the columns, 0, 1, 2, ..., or None.
            head_mask: must be None, as attention heads cannot be left out.
            inputs_embeds: must be None, as every backbone has embeddings of its own.
            encoder_hidden_states: must be None, as a chain has no decoder.
            encoder_attention_mask: must be None, as a chain has no decoder.
            past_key_values: must be None, as a chain keeps nothing from call to call.
            use_cache: must be false or None, as a chain keeps nothing from call to call.
            output_attentions: whether to return the attention maps of the largest backbone.
            output_hidden_states: must be false or None, as hidden layers have no reverse-distilled form.
            return_dict: whether to return an object with named outputs, not a tuple; by default what the
                config says.

        Returns:
            `last_hidden_state`, `(batch, time, width)` nested embeddings, with zeros at padding. Where they
            were asked for, `attentions`, one `(batch, heads, time, time)` for each layer. There is no
            `pooler_output`: the pooler of ESM-2 is not trained.

        Raises:
            TypeError: for ids that are neither integers nor distributions.
            ValueError: for ids of another rank or range, a mask of another shape, or an argument that must be
                None.
        """
        refused = {
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache or None,
            "head_mask": head_mask,
            "output_hidden_states": is_wanted(output_hidden_states, self.config.output_hidden_states) or None,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"expected no {name}, for {REFUSED_ARGUMENTS[name]}")
        if input_ids is None:
            raise ValueError("expected input_ids, got none")
        _require_columns(position_ids, input_ids)
        tokens = _with_padding(input_ids, attention_mask, self.model.padding_idx)
        maps = None
        if is_wanted(output_attentions, self.config.output_attentions):
            out = self.model(tokens, need_head_weights=True)
            embeddings, maps = out.embeddings, out.attentions.unbind(1)
        else:
            embeddings = self.model.encode(tokens)
        answer = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=embeddings, attentions=maps)
        return as_dict_or_tuple(answer, return_dict, self.config)

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict contacts with the largest backbone.

        Args:
            tokens: `(batch, time)` ids.
            attention_mask: `(batch, time)`, 0 at padding; without a mask, `<pad>` is padding.

        Returns:
            `(batch, residues, residues)` probabilities.
        """
        return self.model.predict_contacts(_with_padding(tokens, attention_mask, self.model.padding_idx))


def is_wanted(asked: bool | None, otherwise: bool | None) -> bool:
    """Tell whether an output is wanted: by the argument of the call, or else by the config."""
    return bool(otherwise if asked is None else asked)


def as_dict_or_tuple(
    answer: ModelOutput, return_dict: bool | None, config: PretrainedConfig
) -> ModelOutput | tuple[Any, ...]:
    """Return the output itself, or a tuple of it where the call or the config asks for one."""
    as_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return answer if as_dict else answer.to_tuple()


def _require_columns(positions: Tensor | None, ids: Tensor) -> None:
    """Raise a ValueError for positions other than the numbers of the columns."""
    if positions is not None:
        columns = torch.arange(ids.shape[1], device=positions.device)
        if positions.shape[-1:] != columns.shape or bool((positions != columns).any()):
            raise ValueError("expected position_ids 0, 1, 2, ..., or none, got others")


def _with_padding(ids: Tensor, mask: Tensor | None, padding_idx: int) -> Tensor:
    """Return the ids, or distributions, with `<pad>` wherever the mask has 0."""
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
