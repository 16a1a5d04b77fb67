"""ESM-C with random weights: transformers' model and ours, a small family, the files in every layout."""

import json
import math

import pytest
import torch
from helpers import random_stages
from safetensors.torch import save_file

from rd_torch import ESMC, Level, RDModel
from rd_torch.levels import ESMC_ALPHABET

SHAPES = {"a": (2, 32, 2), "b": (2, 48, 2), "c": (3, 64, 4)}
WIDTHS = {name: width for name, (_, width, _) in SHAPES.items()}


def oracle():
    """The package transformers, if it has ESM-C; the test is skipped where it has none."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "EsmcModel"):
        pytest.skip(
            "the installed transformers is older than 5.16, which has no EsmcModel", allow_module_level=True
        )
    return transformers


def _random_tensors(shapes, seed):
    """Weights that keep attention selective and activations of unit size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in shapes.items():
        bound = 0.3
        if like.ndim == 2:
            bound = math.sqrt(3) if "embed_tokens" in name else math.sqrt(3 / like.shape[1])
        tensors[name] = torch.empty(like.shape).uniform_(-bound, bound, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            tensors[name] += 1.5 if "q_norm" in name or "k_norm" in name else 1
    return tensors


def random_esmc(num_layers, width, attention_heads, seed=0):
    """transformers' model with random weights."""
    transformers = oracle()
    config = transformers.EsmcConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=attention_heads,
        intermediate_size=256 * math.ceil(8 * width / 3 / 256),
    )
    model = transformers.EsmcForMaskedLM(config).eval()
    model.load_state_dict(_random_tensors(model.state_dict(), seed))
    return model


def our_esmc(num_layers, width, attention_heads, seed=0):
    """Our backbone, with the numbers of `random_esmc`."""
    backbone = ESMC(num_layers, width, attention_heads).eval()
    backbone.load_state_dict(_random_tensors(backbone.state_dict(), seed))
    return backbone


def small_esmc(predict_from="nested", special_rows="maps"):
    """A random family of three levels, the same at every call."""
    backbones = {name: our_esmc(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    stages = random_stages(predict_from, WIDTHS)
    return RDModel(backbones, stages, predict_from=predict_from, special_rows=special_rows).eval()


def tokens_of(*sequences):
    """A batch of token ids; `<mask>` and `|` may stand in a sequence."""
    return ESMC_ALPHABET.get_batch_converter()([("", sequence) for sequence in sequences])[2]


def ours_of(reference):
    """Our backbone around the reference's tensors."""
    config = reference.config
    level = Level(
        "x", config.num_hidden_layers, config.hidden_size, config.num_attention_heads, family="esmc"
    )
    tensors = {name.removeprefix("esmc."): each for name, each in reference.state_dict().items()}
    return ESMC.from_tensors(level, tensors).eval()


def save_packed(reference, folder, *, first=False, prefix="esmc."):
    """The reference's tensors as research checkpoints pack them, by either of their two sets of names."""
    renamed = {
        "embed_tokens.": "embed.",
        "norm.": "transformer.norm.",
        "input_layernorm.": "attn.layernorm_qkv.0." if first else "attn.layernorm_qkv.layer_norm_",
        "self_attn.q_norm.": "attn.q_ln.",
        "self_attn.k_norm.": "attn.k_ln.",
        "self_attn.o_proj.": "attn.out_proj.",
        "post_attention_layernorm.": "ffn.0." if first else "ffn.layer_norm_",
        "mlp.down_proj.weight": "ffn.3.weight" if first else "ffn.fc2_weight",
        "dense.": "0.",
        "layer_norm.": "2.",
        "decoder.": "3.",
    }
    qkv, gate_up = ("attn.layernorm_qkv.1.weight", "ffn.1.weight") if first else (
        "attn.layernorm_qkv.weight", "ffn.fc1_weight"
    )  # fmt: skip
    state, packed = reference.state_dict(), {}
    for name, tensor in state.items():
        inner = name.removeprefix("esmc.")
        base, rest = prefix, inner
        if inner.startswith("layers."):
            _, layer, rest = inner.split(".", 2)
            base = f"{prefix}transformer.blocks.{layer}."
        elif inner.startswith("lm_head."):
            base, rest = "sequence_head." if first else "lm_head.", inner.removeprefix("lm_head.")
        here = name.removesuffix(rest)
        if rest == "self_attn.q_proj.weight":
            packed[base + qkv] = torch.cat([state[f"{here}self_attn.{each}_proj.weight"] for each in "qkv"])
        elif rest == "mlp.gate_proj.weight":
            packed[base + gate_up] = torch.cat([tensor, state[f"{here}mlp.up_proj.weight"]])
        elif not rest.startswith(("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")):
            (old,) = [old for old in renamed if rest.startswith(old)]
            packed[base + rest.replace(old, renamed[old])] = tensor.clone()
        if rest == "mlp.down_proj.weight" and not first:
            packed[base + "ffn._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    folder.mkdir(exist_ok=True)
    config = reference.config
    facts = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "vocab_size": 64,
        "model_type": "esmc",
        "architectures": ["ESMCForMaskedLM"],
    }
    if first:  # a file of PyTorch's, without a config
        torch.save(packed, folder / "esmc.pth")
    else:
        save_file(packed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(facts))
    return folder / "esmc.pth" if first else folder
