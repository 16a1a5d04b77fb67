"""ESM-C where hooks fetch its weights, and in int8."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from esmc import SHAPES, small_esmc, tokens_of
from helpers import loaded_by_a_map, random_sequence, random_stages
from int8 import ways
from torch import nn

import rd_torch
from rd_torch import RDModel
from rd_torch.modules import plain_parts

TOKENS = tokens_of("M", "MK<mask>L", "M|V", random_sequence(36, 2))
PROTEINS = {f"P{k}": random_sequence(5 + 3 * k, k) for k in range(12)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Weights that hooks fetch


def empty_chain():
    """The chain without its numbers."""
    return RDModel({name: rd_torch.ESMC(*shape) for name, shape in SHAPES.items()}, random_stages())


OFFLOADED = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "cpu with buffers": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", offload_buffers=True
    ),
    "disk": lambda model, folder: accelerate.disk_offload(
        model, folder, execution_device="cpu", offload_buffers=True
    ),
    "whole layers": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=["ESMCLayer", "ESMCHead"]
    ),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model,
        {"backbones.a": "cpu", "backbones.b": "disk", "backbones.c": "cpu", "stages": "disk"},
        offload_dir=folder,
    ),
    "a map": lambda model, folder: loaded_by_a_map(model, folder, empty_chain, ["ESMCLayer"]),
}


WAYS_AND_DTYPES = [
    pytest.param(way, dtype, id=f"{name}, {dtype}")
    for name, way in OFFLOADED.items()
    for dtype in (torch.float32, torch.bfloat16)
    if (name, dtype) != ("a map", torch.bfloat16)  # which reads a state dict as the empty chain is
]


@pytest.mark.parametrize(("offload", "dtype"), WAYS_AND_DTYPES)
@torch.no_grad()
def test_weights_that_are_fetched_for_each_call_give_the_same_bits(offload, dtype, tmp_path):
    model = small_esmc().to(dtype)
    expected = model(TOKENS, need_head_weights=True)
    soft = nn.functional.one_hot(TOKENS, 33).float()
    softly = model(soft, width=48).embeddings
    model = offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    out = model(TOKENS, need_head_weights=True)
    for name in ("embeddings", "logits", "attentions"):
        assert torch.equal(out[name], expected[name])
    assert torch.equal(model(soft, width=48).embeddings, softly)


@pytest.mark.parametrize("offload", [OFFLOADED["cpu with buffers"], OFFLOADED["disk"]], ids=["cpu", "disk"])
def test_an_offloaded_chain_embeds_is_saved_and_fitted_as_any(offload, tmp_path):
    whole, sequences = small_esmc(), list(PROTEINS.values())
    chain = offload(small_esmc(), tmp_path / "offloaded")
    assert chain.fingerprint() == whole.fingerprint()
    assert np.array_equal(rd_torch.embed(chain, sequences), rd_torch.embed(whole, sequences))
    chain.save_pretrained(tmp_path / "saved")
    assert RDModel.from_pretrained(tmp_path / "saved").fingerprint() == whole.fingerprint()
    fitted = [rd_torch.fit(dict(model.backbones.items()), sequences) for model in (chain, whole)]
    for ours, theirs in zip(fitted[0].stages.buffers(), fitted[1].stages.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_load_of_a_layer_serves_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.backbone.packing.CHUNK_TOKENS", 8)
    monkeypatch.setattr("rd_torch.backbone.packing.CHUNK_FEATURES", 8)
    calls = []

    def counted(linear):
        forward = linear.forward
        linear.forward = lambda x: calls.append(1) or forward(x)  # before accelerate puts its own around

    model = small_esmc()
    for layer in model.backbones["c"].layers:
        counted(layer.mlp.down_proj)
    with torch.no_grad():
        expected = model(TOKENS).embeddings
        assert len(calls) > 3, "chunk by chunk"
        calls.clear()
        out = OFFLOADED["cpu"](model, tmp_path)(TOKENS).embeddings
    assert len(calls) == 3
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# int8


@ways
def test_every_layer_is_int8_and_the_numbers_are_near(quantise, tmp_path):
    exact = small_esmc()
    model = quantise(copy.deepcopy(exact)).eval()
    for name, backbone in exact.backbones.items():
        linear = [place for place, part in backbone.layers.named_modules() if isinstance(part, nn.Linear)]
        assert len(linear) == 7 * backbone.num_layers
        for place in linear:
            state = model.backbones[name].layers.get_submodule(place).state_dict()
            parts = [part for each in state.items() for _, part in plain_parts(*each)]
            assert any(part.dtype == torch.int8 for part in parts), place
    with torch.no_grad():
        out, expected = model(TOKENS), exact(TOKENS)
        error = (out.embeddings - expected.embeddings).abs().mean() / expected.embeddings.std()
        assert 1e-4 < error < 0.4
        assert torch.equal(model(TOKENS, width=48).embeddings, out.embeddings[..., :48])
    assert model.fingerprint() == quantise(copy.deepcopy(exact)).fingerprint() != exact.fingerprint()
    with pytest.raises(ValueError, match=r"expected plain tensors to save, got layers.0.* as a .*: save the"):
        model.save_pretrained(tmp_path)
    chain = rd_torch.fit(dict(model.backbones.items()), list(PROTEINS.values()), regressor="ols")
    with torch.no_grad():
        assert torch.equal(chain(TOKENS).representations["a"], out.representations["a"])
