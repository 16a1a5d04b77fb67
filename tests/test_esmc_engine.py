"""ESM-C behind the engine and in exported files."""

import warnings

import numpy as np
import pytest
import torch
from esmc import SHAPES, WIDTHS, our_esmc, small_esmc, tokens_of
from helpers import random_sequence, random_stages
from torch import nn

import rd_torch
from rd_torch import ESM2, RDModel, exporting, hardware
from rd_torch.backbone import engine
from rd_torch.backbone.engine import Engine
from rd_torch.backbone.preparing import obstacle

BATCHES = [
    ("MKV", random_sequence(40)),
    (random_sequence(60, 1),),
    ("M", "MK<mask>L", "M|V", random_sequence(36, 2)),
    (random_sequence(200, 3), random_sequence(3, 4)),
]
TOKENS = tokens_of(*BATCHES[2])

# The engine


@pytest.fixture
def on_engine(monkeypatch):
    """A CPU that answers as if the engine were for it too."""
    monkeypatch.setattr(hardware, "has_engine", lambda device: True)


@pytest.fixture
def uncompiled(monkeypatch):
    """The parts as they are: for what does not depend on the compiler."""
    monkeypatch.setattr(engine, "_compile_parts", lambda kind: (kind.begin, kind.finish))


def test_every_length_runs_what_was_compiled_once_a_width(counter, on_engine):
    model = small_esmc()
    with torch.no_grad():
        expected = [model(tokens_of(*batch)) for batch in BATCHES]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.prepare_inference()
        for batch, reference in zip(BATCHES, expected, strict=True):
            out = model(tokens_of(*batch))
            for part in ("embeddings", "logits"):
                torch.testing.assert_close(out[part], reference[part], atol=2e-5, rtol=0)
    assert model._prepared._engine is not None
    assert counter.frame_count == 2 * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_engine_gives_the_modules_numbers_and_keeps_prefixes(uncompiled, on_engine, monkeypatch, dtype):
    model, run, runs = small_esmc().to(dtype), Engine._run, []
    model.prepare_inference()
    monkeypatch.setattr(Engine, "_run", lambda *call: runs.append(1) or run(*call))
    with torch.no_grad():
        whole = model(TOKENS).embeddings
        for width in (*WIDTHS.values(), 7):
            assert torch.equal(model(TOKENS, width=width).embeddings, whole[..., :width])
    assert len(runs) == 5


def entrances():
    """Two backbones of one alphabet and one layer's shape, one with token dropout and one without."""
    return {"a": ESM2(1, 32, 2), "b": ESM2(1, 48, 2, token_dropout=False)}


class Other(rd_torch.ESMC):
    """A family of its own, whose alphabet is ESM-C's."""

    family = "other"
    own_modules = rd_torch.ESMC.own_modules


MIXED = {
    "token dropout": (entrances, "tokens enter the backbones in different ways"),
    "two classes": (lambda: {"a": our_esmc(1, 32, 2), "b": Other(1, 48, 2)}, "in different ways"),
}


@pytest.mark.parametrize(("backbones", "message"), MIXED.values(), ids=[*MIXED])
def test_two_ways_of_entering_in_one_chain_are_left_to_the_modules(uncompiled, on_engine, backbones, message):
    model = RDModel(backbones(), random_stages(widths={"a": 32, "b": 48})).eval()
    tokens = TOKENS.clamp(max=30)
    with torch.no_grad():
        expected = model(tokens).embeddings
        with pytest.warns(UserWarning, match=message):
            model.prepare_inference()
        assert torch.equal(model(tokens).embeddings, expected)


def test_changes_are_noticed(uncompiled, on_engine):
    model = small_esmc()
    with torch.no_grad():
        before = model.prepare_inference()(TOKENS).embeddings
        gate = model.backbones["b"].layers[0].mlp.gate_proj
        gate.weight = nn.Parameter(2 * gate.weight)
        got = model(TOKENS).embeddings
        model._prepared = None
        torch.testing.assert_close(got, model(TOKENS).embeddings, atol=2e-5, rtol=0)
        assert torch.equal(got[..., :32], before[..., :32])
        assert (got - before).abs().max() > 1e-2
    assert model.prepare_inference()._prepared.is_current
    rotary = model.backbones["c"].rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()
    assert not model._prepared.is_current


def test_a_plain_family_has_no_obstacle_and_a_hooked_one_has():
    model = small_esmc()
    assert obstacle(model.family()) is None
    model.backbones["c"].layers[2].mlp.register_forward_hook(lambda *_: None)
    assert obstacle(model.family()) == "c.layers.2.mlp has hooks"
    model.backbones["a"].layers[0].self_attn.o_proj = nn.Sequential(nn.Identity())
    assert "a.layers.0.self_attn.o_proj is a torch.nn.modules.container.Sequential" in obstacle(
        model.family()
    )


# Exported files


needs_exporter = pytest.mark.skipif(
    hardware.is_older(torch.__version__, exporting.OLDEST_EXPORTER), reason="this PyTorch is refused"
)


@needs_exporter
def test_an_onnx_file_gives_the_models_embeddings(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_esmc().truncate("b")
    rd_torch.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["rd_torch.fingerprint"] == model.fingerprint()
    assert '"|"' in facts["rd_torch.tokens"]
    for batch in BATCHES:
        tokens = tokens_of(*batch)
        got, mask = session.run(None, {"tokens": tokens.numpy()})
        with torch.no_grad():
            out = model(tokens)
        np.testing.assert_allclose(got, out.embeddings, atol=1e-4 * float(out.embeddings.std()))
        assert np.array_equal(mask, out.residue_mask)


@needs_exporter
@pytest.mark.slow
def test_a_compiled_package_gives_the_models_embeddings(tmp_path):
    model = small_esmc()
    rd_torch.export(model, tmp_path / "model.pt2")
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    for batch in BATCHES:
        tokens = tokens_of(*batch)
        embeddings, mask = run(tokens)
        with torch.no_grad():
            out = model(tokens)
        assert (embeddings - out.embeddings).abs().max() <= 1e-4 * out.embeddings.std()
        assert torch.equal(mask, out.residue_mask)
