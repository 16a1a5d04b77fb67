"""int8 by the libraries that people use reaches every layer, and every door takes such a model."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers import random_sequence, small_model, tokens_of
from int8 import WAYS, in_ways, needs_torchao, torchao, ways, weights_alone
from torch import nn

import rd_torch
from rd_torch import RDModel
from rd_torch.modules import plain_parts
from rd_torch.store.folder import Folder

PROTEINS = {f"P{k}": random_sequence(5 + 3 * k, k) for k in range(20)}
TOKENS = tokens_of(*list(PROTEINS.values())[:6], "MK<mask>VXB")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def exact():
    return small_model()


def quantised(quantise, model):
    return quantise(copy.deepcopy(model)).eval()


def is_int8(layer):
    """Whether a linear layer keeps its weight in int8, in whatever the library wraps it."""
    parts = (part for value in layer.state_dict().items() for _, part in plain_parts(*value))
    return any(
        part.dtype == torch.int8 and part.numel() == layer.in_features * layer.out_features for part in parts
    )


def error_of_a_layer(quantise):
    """What the library makes of one linear layer here, in standard deviations.

    Without VNNI oneDNN adds products of int8 in 16 bits, and overflows: torchao is a tenth off.
    """
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(20, 32)
    with torch.no_grad():
        expected = layer(x)
        return float((quantise(layer)(x) - expected).abs().mean() / expected.std())


@ways
def test_every_layer_of_every_backbone_is_int8_and_the_numbers_are_near(quantise, exact):
    model = quantised(quantise, exact)
    for name, backbone in exact.backbones.items():
        linear = [place for place, part in backbone.layers.named_modules() if isinstance(part, nn.Linear)]
        assert len(linear) == 6 * backbone.num_layers
        got = model.backbones[name].layers
        assert all(is_int8(got.get_submodule(place)) for place in linear)
    with torch.no_grad():
        out, expected = model(TOKENS, return_contacts=True), exact(TOKENS, return_contacts=True)
    most = 0.08 if error_of_a_layer(quantise) < 0.03 else 0.4
    for level, start in (("a", 0), ("b", 32), ("c", 48)):
        ours, theirs = (each.representations[level][..., start:] for each in (out, expected))
        error = (ours - theirs).abs().mean() / theirs.std()
        assert 1e-4 < error < most, level
    assert torch.equal(out.representations["b"], model(TOKENS, width=48).embeddings)
    assert (out.contacts - expected.contacts).abs().max() < 0.3


@in_ways("weights alone", "dynamic a token")
def test_a_proteins_embedding_does_not_depend_on_its_company(quantise, exact):
    """As it does where one scale serves all activations of a batch."""
    model = quantised(quantise, exact)
    sequences = list(PROTEINS.values())
    together = rd_torch.embed(model, sequences)
    alone = [rd_torch.embed(model, [sequence])[0] for sequence in sequences]
    within = 1e-4 if quantise is weights_alone else 0.1  # a number on the edge of two falls on either side
    np.testing.assert_allclose(together, alone, atol=within)


@needs_torchao
def test_fingerprints_tell_what_is_quantised_and_how(exact):
    models = {name: quantised(quantise, exact) for name, quantise in WAYS.items()}
    told = {name: model.fingerprint() for name, model in models.items()}
    assert len({*told.values(), exact.fingerprint()}) == 4
    for name, quantise in WAYS.items():
        assert quantised(quantise, exact).fingerprint() == told[name]
        assert copy.deepcopy(models[name]).fingerprint() == told[name]
    other = copy.deepcopy(exact)
    with torch.no_grad():
        other.backbones["b"].layers[1].fc2.weight[3, 4] += 1
    for name, quantise in WAYS.items():
        assert quantise(copy.deepcopy(other)).fingerprint() != told[name]


class Kill(BaseException):
    """Stands for whatever ends a run."""


@ways
@pytest.mark.parametrize("suffix", ["h5", "parquet"])
def test_stores_are_written_resumed_and_refused_to_other_models(
    quantise, suffix, exact, tmp_path, monkeypatch
):
    model, path = quantised(quantise, exact), tmp_path / f"out.{suffix}"
    options = {"tokens_per_batch": 20}
    rd_torch.embed_to_store(model, PROTEINS.items(), tmp_path / f"whole.{suffix}", **options)
    write, written = Folder.write, []

    def until_killed(folder, *arguments, **how):
        if len(written) == 2:
            raise Kill
        written.append(1)
        write(folder, *arguments, **how)

    monkeypatch.setattr(Folder, "write", until_killed)
    with pytest.raises(Kill):
        rd_torch.embed_to_store(model, PROTEINS.items(), path, **options)
    monkeypatch.setattr(Folder, "write", write)
    with pytest.raises(ValueError, match=r"expected .*with which .* was begun"):
        rd_torch.embed_to_store(exact, PROTEINS.items(), path, **options)
    again = quantised(quantise, exact)
    rd_torch.embed_to_store(again, PROTEINS.items(), path, **options)
    with rd_torch.open_store(path) as got, rd_torch.open_store(tmp_path / f"whole.{suffix}") as whole:
        assert list(got) == list(PROTEINS)
        assert np.array_equal(np.asarray(got), np.asarray(whole))
        assert got.facts == whole.facts


@ways
def test_what_is_saved_is_the_model_or_nothing(quantise, exact, tmp_path):
    exact.save_pretrained(tmp_path / "model")
    model = quantised(quantise, RDModel.from_pretrained(tmp_path / "model"))
    for storage in ("included", "referenced"):
        with pytest.raises(
            ValueError,
            match=r"expected plain tensors to save, got layers.0.* as a .*: save the model before you",
        ):
            model.save_pretrained(tmp_path / "model", backbones=storage)
    again = quantise(RDModel.from_pretrained(tmp_path / "model"))
    assert again.fingerprint() == model.fingerprint()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other = quantise(other)
    state = torch.load(tmp_path / "state.pt", weights_only=False)  # what layers pack is more than weights
    other.load_state_dict(state)
    assert other.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert torch.equal(other(TOKENS).embeddings, model(TOKENS).embeddings)


@needs_torchao
@pytest.mark.skipif(transformers.__version__ < "5", reason="older transformers do not save int8")
def test_transformers_quantises_while_it_loads_and_saves_int8(exact, tmp_path):
    rd_torch.TransformersEncoder(exact).save_pretrained(tmp_path / "exact")
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    load = rd_torch.TransformersEncoder.from_pretrained
    encoder = load(tmp_path / "exact", quantization_config=config).eval()
    assert is_int8(encoder.model.backbones["a"].layers[0].fc1)
    encoder.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8").eval()
    with torch.no_grad():
        got, expected = (each(TOKENS).last_hidden_state for each in (again, encoder))
        near = load(tmp_path / "exact").eval()(TOKENS).last_hidden_state
    assert torch.equal(got, expected)
    assert 0 < (got - near).abs().mean() < 0.05


@ways
def test_a_chain_is_fitted_of_quantised_backbones(quantise, exact):
    model = quantised(quantise, exact)
    backbones = {name: model.backbones[name] for name in ("a", "b")}
    chain = rd_torch.fit(backbones, list(PROTEINS.values()))
    with torch.no_grad():
        assert torch.equal(chain(TOKENS).representations["a"], model(TOKENS).representations["a"])
