"""Rename the tensors of an ESM-2 to fair-esm's names, whichever program wrote them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from rd_torch.backbone import EMBEDDING, inverse_frequencies

SHARED_ANGLES: Final = "rot_emb.inv_freq"
ANGLES: Final = "layers.{}.self_attn.rot_emb.inv_freq"

_PREFIXES: Final = ("encoder.sentence_encoder.", "encoder.", "esm.")

# Names of transformers' EsmForMaskedLM without their `esm.`. The order matters: a longer name is replaced
# before the one that it ends with, as `.attention.output.dense.` before `.output.dense.`.
_TRANSFORMERS: Final = (
    (r"^embeddings\.word_embeddings\.", "embed_tokens."),
    (r"^(encoder\.)?emb_layer_norm_after\.", "emb_layer_norm_after."),
    (r"^(encoder\.layer\.\*\.attention\.self\.)?rotary_embeddings\.inv_freq$", SHARED_ANGLES),
    (r"^(encoder\.)?layer\.(\d+)\.", r"layers.\2."),
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".self_attn.{match[1][0]}_proj."),
    (r"\.attention\.self\.rotary_embeddings\.", ".self_attn.rot_emb."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.LayerNorm\.", ".self_attn_layer_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"\.LayerNorm\.", ".final_layer_norm."),
    (r"^lm_head\.decoder\.", "lm_head."),
    (r"gamma$", "weight"),  # names in files that early versions of transformers wrote
    (r"beta$", "bias"),
)

# Tensors that ESM-2 does not use: absolute positions, which rotary ones replaced, and heads of other models.
_UNUSED: Final = re.compile(r"position_embeddings\.|position_ids|pooler\.")


def rename(name: str) -> str | None:
    """Return the name that fair-esm gives a tensor, or None for a tensor that ESM-2 does not use."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix) if not name.startswith("encoder.layer.") else name
    if _UNUSED.search(name):
        return None
    for pattern, replacement in _TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def complete_tensors(tensors: Mapping[str, Tensor], num_layers: int, head_size: int) -> dict[str, Tensor]:
    """Give every layer an `inv_freq`, and drop the copy of the embeddings that the language-model head holds.

    Args:
        tensors: the backbone's tensors, by fair-esm's names.
        num_layers: number of transformer layers.
        head_size: number of features of an attention head.

    Returns:
        The tensors that our modules have.

    Raises:
        ValueError: for a language-model head that differs from the embeddings; in ESM-2 they are tied.
    """
    result = dict(tensors)
    head = result.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, result[EMBEDDING]):
        raise ValueError(
            "expected a language-model head that is tied to the embeddings, got another lm_head.weight"
        )
    shared = result.pop(SHARED_ANGLES, None)
    if shared is None and ANGLES.format(0) not in result:
        warnings.warn(
            "the checkpoint has no inv_freq, so it is computed anew, without the rounding of ESM-2's "
            "training; this shifts embeddings slightly",
            stacklevel=4,
        )
        shared = inverse_frequencies(head_size)
    if shared is not None:
        result.update({ANGLES.format(layer): shared for layer in range(num_layers)})
    return result
