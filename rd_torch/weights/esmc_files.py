"""The files of ESM-C, in transformers' layout, or packed, as the research checkpoints have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from rd_torch.backbone import EMBEDDING, ESMC, hidden_width
from rd_torch.levels import ESMC_LEVELS, Level
from rd_torch.weights.convention import Convention, Shapes, published_size

# Names of the packed layout (transformer-engine's, then PyTorch's own before it), and of heads. The order
# matters: what a longer name ends with comes after it.
_NAMES: Final = (
    (r"^esmc\.", ""),
    (r"^embed\.", "embed_tokens."),
    (r"^transformer\.norm\.", "norm."),
    (r"^transformer\.blocks\.", "layers."),
    (r"\.attn\.layernorm_qkv\.(layer_norm_|0\.)", ".input_layernorm."),
    (r"\.attn\.layernorm_qkv\.(1\.)?weight$", ".qkv"),
    (r"\.attn\.(q|k)_ln\.", r".self_attn.\1_norm."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.ffn\.(layer_norm_|0\.)", ".post_attention_layernorm."),
    (r"\.ffn\.(fc1_|1\.)weight$", ".gate_up"),
    (r"\.ffn\.(fc2_|3\.)weight$", ".mlp.down_proj.weight"),
    (r"^(lm_head|sequence_head)\.0\.", "lm_head.dense."),
    (r"^(lm_head|sequence_head)\.2\.", "lm_head.layer_norm."),
    (r"^(lm_head|sequence_head)\.3\.", "lm_head.decoder."),
)

_PACKED: Final = {
    ".qkv": tuple(f".self_attn.{part}_proj.weight" for part in "qkv"),
    ".gate_up": (".mlp.gate_proj.weight", ".mlp.up_proj.weight"),
}
"""For each packed tensor, the names of its parts, in the order in which they lie in it."""

_UNUSED: Final = re.compile(r"_extra_state$|inv_freq$|^classifier\.|^score\.")
"""What no embedding depends on: the state of kernels, angles, which are computed, and heads of tasks."""

_FACTS: Final = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 64,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "rope_theta": 10_000,
    "rope_type": "default",
    "type": "default",  # the older name of rope_type
}


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a tensor in a file holds of our modules, by transformers' names."""
    if _UNUSED.search(name):
        return
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    for ending, parts in _PACKED.items():
        if name.endswith(ending):
            base = name.removesuffix(ending)
            for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
                yield base + part, rows
            return
    yield name, tensor


def _level_of(shapes: Shapes, config: Mapping[str, Any], place: str) -> Level:
    """Tell the level from the shapes of tensors and, for other sizes than the published, from the config."""
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.")}
    gate = shapes.get("layers.0.mlp.gate_proj.weight")
    if EMBEDDING not in shapes or gate is None:
        examples = ", ".join(sorted(shapes)[:3]) or "no tensors"
        raise ValueError(f"expected a whole ESM-C in {place}, got a file with {examples}")
    num_layers, width = max(layers) + 1, shapes[EMBEDDING][-1]
    size = published_size(ESMC_LEVELS, num_layers, width)
    heads = config.get("num_attention_heads", config.get("n_heads", size and size.attention_heads))
    if heads is None:
        raise ValueError(
            "expected a config.json beside the tensors, which tells the number of attention heads, in "
            f"{place}, got none: {num_layers} layers of width {width} are no published size of ESM-C"
        )
    facts = {} if gate[0] == hidden_width(width) else {"hidden_dim": gate[0]}
    return Level("size", num_layers, width, heads, family=ESMC.family, facts=facts)


ESMC_FILES: Final = Convention(
    family=ESMC.family,
    title="ESM-C",
    model_type="esmc",
    facts=_FACTS,
    sizes=ESMC_LEVELS,
    marks=re.compile(r"\.(attn\.layernorm_qkv|attn\.q_ln|self_attn\.q_norm)\."),
    renamed=_renamed,
    level_of=_level_of,
    completed=lambda tensors, level: dict(tensors),
)
