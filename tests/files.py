"""ESM-2 and maps in the files of other people: what the loading tests read."""

import inspect
from argparse import Namespace
from itertools import pairwise

import numpy as np
import torch
from helpers import random_esm2
from safetensors.torch import save_file

SMALL_LEVELS = {"8M": (2, 320, 20), "35M": (2, 480, 20), "150M": (2, 640, 20)}
"""Published widths with two layers: maps fit, tests stay quick."""


def perturbed_esm2(num_layers, width, attention_heads, seed=0):
    """fair-esm's model in which every tensor is its own: `inv_freq` too, the same in all layers."""
    module = random_esm2(num_layers, width, attention_heads, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    inv_freq = module.layers[0].self_attn.rot_emb.inv_freq
    inv_freq = inv_freq * (1 + 0.1 * torch.rand(inv_freq.shape, generator=generator))
    for layer in module.layers:
        layer.self_attn.rot_emb.inv_freq.copy_(inv_freq)
    return module


def transformers_model(module):
    """transformers' EsmForMaskedLM with the weights of fair-esm's model."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=module.embed_dim,
        num_hidden_layers=module.num_layers, num_attention_heads=module.attention_heads,
        intermediate_size=4 * module.embed_dim, max_position_embeddings=1026, layer_norm_eps=1e-5,
        position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
    )  # fmt: skip
    theirs = EsmForMaskedLM._from_config(config, attn_implementation="eager").eval()  # contacts need maps
    ours = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("inv_freq")}
    layer_names = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "LayerNorm",
    }
    renamed = {}
    for name, tensor in ours.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            name = f"esm.encoder.layer.{layer}.{layer_names[part]}.{kind}"
        elif name.startswith("embed_tokens"):
            name = "esm.embeddings.word_embeddings.weight"
        elif name.startswith("emb_layer_norm_after"):
            name = f"esm.encoder.{name}"
        elif name.startswith("contact_head"):
            name = f"esm.{name}"
        elif name == "lm_head.weight":
            name = "lm_head.decoder.weight"
        renamed[name] = tensor
    found = theirs.load_state_dict(renamed, strict=False)
    assert not found.unexpected_keys
    angles = [name for name, _ in theirs.named_buffers() if name.endswith("inv_freq")]
    assert set(found.missing_keys) <= {*angles, "lm_head.decoder.bias"}, found.missing_keys
    inv_freq = module.layers[0].self_attn.rot_emb.inv_freq
    for name, buffer in theirs.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(inv_freq)
    return theirs


def rewrite(tensors, path):
    """A safetensors file in place of another, whose pages may still be mapped."""
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def save_sharded_bin(theirs, folder, size="300KB"):
    """Shards of `.bin` as 3B and 15B have them: by transformers while it could, else by the Hub's library."""
    if "safe_serialization" in inspect.signature(theirs.save_pretrained).parameters:
        theirs.save_pretrained(folder, safe_serialization=False, max_shard_size=size)
    else:
        from huggingface_hub import save_torch_state_dict

        theirs.config.save_pretrained(folder)
        save_torch_state_dict(theirs.state_dict(), folder, safe_serialization=False, max_shard_size=size)


def save_fair_esm(module, path, *, regression=True, half=False):
    """fair-esm's own layout: settings beside prefixed tensors, the contact regression in a second file."""
    tensors = dict(module.state_dict())
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("contact_head")}
    prefixed = {
        f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}": tensor
        for name, tensor in tensors.items()
    }
    if half:
        prefixed = {name: tensor.half() for name, tensor in prefixed.items()}
    cfg = Namespace(
        encoder_layers=module.num_layers,
        encoder_embed_dim=module.embed_dim,
        encoder_attention_heads=module.attention_heads,
        token_dropout=True,
    )
    torch.save({"cfg": {"model": cfg}, "model": prefixed}, path)
    if regression:
        torch.save({"model": head}, path.with_name(path.stem + "-contact-regression.pt"))


def published_arrays(p, q, regressor, *, width=None, input_mean=None, seed=0):
    """The arrays of one of the authors' files from p to q features; `regressor` None is naive."""
    rng = np.random.default_rng(seed)

    def orthonormal(rows, size):
        return np.linalg.qr(rng.normal(size=(size, rows)))[0].T

    rows, inputs = (q - p, q) if regressor else (width or q, p + q)
    arrays = {
        "pca__mean_": rng.normal(size=inputs),
        "pca__components_": orthonormal(rows, inputs),
        "pca__explained_variance_": np.linspace(2, 1, rows),
        "pca__explained_variance_ratio_": np.full(rows, 0.9 / rows),
        "pca__n_components": np.array(rows),
        "pca__something_new": np.arange(3),
    }
    kept = p - 7 if regressor == "pcr" else p
    if regressor:
        arrays["regressor__coef_"] = (rng.normal(size=(q, kept)) / np.sqrt(kept)).astype(np.float32)
        arrays["regressor__intercept_"] = rng.normal(size=q).astype(np.float32)
    if regressor == "pcr":
        arrays["regressor__input_mean_"] = rng.normal(size=p) if input_mean is None else input_mean
        arrays["regressor__output_mean_"] = rng.normal(size=q)
        arrays["regressor__input_components_"] = orthonormal(p, p).T
        arrays["regressor__input_eigenvalues_"] = np.linspace(3, 0.1, p)
        arrays["regressor__n_significant_pcs_"] = np.array(kept)
        arrays["regressor__johnstone_threshold_"] = np.array(0.2)
        arrays["regressor__sigma_sq_"] = np.array(0.1)
    elif regressor:
        arrays["regressor__n_features_in_"] = np.array(p)
    if regressor == "linear":
        arrays["regressor__rank_"] = np.array(p)
        arrays["regressor__singular_"] = np.linspace(3, 1, p)
    return arrays


def save_published(folder, method="rd", regressor="pcr", pca="incremental", sequences="1k", *, raw=False):
    """The authors' files from 8M to 150M, as fitted on nested inputs, or on raw ones; their arrays."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    names = list(SMALL_LEVELS)
    kind = regressor if method == "rd" else None
    mean, chain = np.random.default_rng(1).normal(size=320), []
    for k, (smaller, larger) in enumerate(pairwise(names)):
        p, q = SMALL_LEVELS[smaller][1], SMALL_LEVELS[larger][1]
        if k and raw:
            mean = np.random.default_rng(2).normal(size=p)
        elif k:
            mean = np.concatenate([mean, 1e-5 * np.ones(p - len(mean))])
        chain.append(published_arrays(p, q, kind, input_mean=mean, seed=k))
        name = f"{method}-scaler-{smaller}-{larger}-{kind}-{pca}-{sequences}.npz"
        np.savez(folder / "weights" / name, **chain[-1])
    return chain


def published_formula(chain, raw, *, previous=False):
    """Design §6 in float64: raw embeddings by level to what the authors' model returns at each level."""
    (before, *rest), outputs = raw, [raw[0]]
    x = before
    for arrays, y in zip(chain, rest, strict=True):
        mean, components = arrays["pca__mean_"], arrays["pca__components_"]
        if "regressor__coef_" not in arrays:
            x = (np.concatenate([x, y], axis=-1) - mean) @ components.T
        else:
            coefficients = np.float64(arrays["regressor__coef_"])
            source = before if previous else x
            if "regressor__input_mean_" in arrays:
                kept = int(arrays["regressor__n_significant_pcs_"])
                scores = (source - arrays["regressor__input_mean_"]) @ arrays["regressor__input_components_"]
                prediction = scores[..., :kept] @ coefficients.T + arrays["regressor__output_mean_"]
            else:
                prediction = source @ coefficients.T
            prediction = prediction + arrays["regressor__intercept_"]
            x = np.concatenate([x, (y - prediction - mean) @ components.T], axis=-1)
        before = y
        outputs.append(x)
    return outputs
