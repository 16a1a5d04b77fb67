"""The files of ESM-2: whichever program wrote a tensor, its name becomes fair-esm's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from rd_torch.backbone import EMBEDDING, ESM2, inverse_frequencies
from rd_torch.levels import ESM2_LEVELS, Level
from rd_torch.weights.convention import Convention, Shapes, published_size

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


# What transformers' `config.json` must say of an ESM-2.
_FACTS: Final = {
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "layer_norm_eps": 1e-5,
    "vocab_size": 33,
    "rope_theta": 10_000,
    "is_decoder": False,
}


def rename(name: str) -> str | None:
    """Return the name that fair-esm gives a tensor, or None for a tensor that ESM-2 does not use."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix) if not name.startswith("encoder.layer.") else name
    if _UNUSED.search(name):
        return None
    for pattern, replacement in _TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor under fair-esm's name, unless ESM-2 does not use it."""
    ours = rename(name)
    if ours is not None:
        yield ours, tensor


def _level_of(shapes: Shapes, config: Mapping[str, Any], place: str) -> Level:
    """Tell the level from the shapes of tensors, the angles of which tell the number of heads."""
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.")}
    if EMBEDDING not in shapes or not layers:
        examples = ", ".join(sorted(shapes)[:3]) or "no tensors"
        raise ValueError(f"expected an ESM-2 or an ESM-C in {place}, got a file with {examples}")
    num_layers, width = max(layers) + 1, shapes[EMBEDDING][-1]
    size = published_size(ESM2_LEVELS, num_layers, width)
    angles = shapes.get(SHARED_ANGLES, shapes.get(ANGLES.format(0)))
    regression = shapes.get("contact_head.regression.weight")
    if angles:
        heads = width // (2 * angles[-1])
    elif regression:
        heads = regression[-1] // num_layers
    elif size:
        *_, heads = size.shape
    elif "num_attention_heads" in config:
        heads = config["num_attention_heads"]
    else:
        raise ValueError(
            "expected inv_freq or a contact head, which tell the number of attention heads, in "
            f"{place}, got neither"
        )
    facts = {
        fact: False
        for fact, key in (("token_dropout", "token_dropout"), ("tied", "tie_word_embeddings"))
        if config.get(key) is False
    }
    if "lm_head.weight" not in shapes:
        facts.pop("tied", None)
    return Level("size", num_layers, width, heads, facts=facts)


def _complete(tensors: Mapping[str, Tensor], level: Level) -> dict[str, Tensor]:
    """Give every layer an `inv_freq`, and drop the copy of the embeddings that the language-model head holds.

    Args:
        tensors: the backbone's tensors, by fair-esm's names.
        level: the backbone's shape.

    Returns:
        The tensors that our modules have.

    Raises:
        ValueError: for a language-model head that differs from the embeddings, where the config does not say
            so; in ESM-2 they are tied.
    """
    result = dict(tensors)
    _, width, heads = level.shape
    if level.facts.get("tied", True):
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
        shared = inverse_frequencies(width // heads)
    if shared is not None:
        result.update({ANGLES.format(layer): shared for layer in range(level.depth or 0)})
    return result


ESM2_FILES: Final = Convention(
    family=ESM2.family,
    title="ESM-2",
    model_type="esm",
    facts=_FACTS,
    sizes=ESM2_LEVELS,
    marks=re.compile(r"(^|\.)(fc1|intermediate\.dense|emb_layer_norm_after)\."),
    renamed=_renamed,
    level_of=_level_of,
    completed=_complete,
)
