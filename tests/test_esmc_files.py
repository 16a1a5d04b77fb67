"""ESM-C from files: transformers' layout, packed research checkpoints, ours, and the Hub."""

import json

import pytest
import torch
from esmc import our_esmc, ours_of, random_esmc, save_packed
from helpers import random_stages
from safetensors.torch import load_file, save_file

import rd_torch
from rd_torch import ESM2, ESMC, RDModel
from rd_torch.levels import ESMC_ALPHABET

SHAPE = (2, 64, 4)


@pytest.fixture(scope="module")
def theirs():
    return random_esmc(*SHAPE)


@pytest.fixture(scope="module")
def tokens():
    converter = ESMC_ALPHABET.get_batch_converter()
    return converter([("", "MKTAYIAKQR<mask>QISFVKSH|FSRQ<mask>"), ("", "XBUZOM"), ("", "M")])[2]


def assert_same(model, theirs, tokens):
    with torch.no_grad():
        out = model(tokens)
        expected = theirs(tokens, attention_mask=(tokens != 1).long(), output_hidden_states=False)
        hidden = theirs.esmc(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
    real = tokens != 1
    torch.testing.assert_close(out.embeddings[real], hidden[real], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.logits[real], expected.logits[real], atol=5e-5, rtol=0)


def test_transformers_folders_give_transformers_outputs(theirs, tokens, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert_same(RDModel.from_pretrained(tmp_path), theirs, tokens)


def test_shards_load_too(theirs, tokens, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(RDModel.from_pretrained(tmp_path), theirs, tokens)


def test_an_encoder_without_head_has_no_logits(theirs, tokens, tmp_path):
    theirs.esmc.save_pretrained(tmp_path)
    model = RDModel.from_pretrained(tmp_path)
    assert model(tokens).logits is None
    with pytest.raises(RuntimeError, match="expected a backbone with a contact head, got one of esmc"):
        model.predict_contacts(tokens)


@pytest.mark.parametrize("prefix", ["esmc.", ""])
def test_packed_checkpoints_give_the_same_tensors(theirs, tokens, tmp_path, prefix):
    folder = save_packed(theirs, tmp_path / "packed", prefix=prefix)
    model = RDModel.from_pretrained(folder)
    assert_same(model, theirs, tokens)
    mine, other = (each.tensors() for each in (*model.backbones.values(), ours_of(theirs)))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_first_layout_is_read_of_published_sizes_and_refused_of_others(tmp_path, tokens, monkeypatch):
    """How many heads there are stands in no tensor; of published sizes it is known."""
    level = rd_torch.Level("300M", 3, 32, 2, family="esmc")  # a size that a test can hold
    monkeypatch.setitem(rd_torch.ESMC_LEVELS, "300M", level)
    known = random_esmc(*level.shape)
    model = RDModel.from_pretrained(save_packed(known, tmp_path / "known", first=True, prefix=""))
    assert model.config.levels[0] == level
    assert_same(model, known, tokens[1:2, :8])
    other = save_packed(random_esmc(*SHAPE), tmp_path / "other", first=True, prefix="")
    with pytest.raises(ValueError, match=r"expected a config.json beside the tensors.*2 layers of width 64"):
        RDModel.from_pretrained(other)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("vocab_size", 33),
        ("mask_token_id", 3),
        ("rope_theta", 20_000.0),
    ],
)
def test_another_computation_is_told_by_the_config(theirs, tmp_path, key, value):
    theirs.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    facts.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"expected an ESM-C with {key} .*, got {value!r}"):
        RDModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("angles", "message"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, "rope_theta 10000, got 1000000.0"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "rope_type 'default', got 'linear'"),
    ],
)
def test_other_angles_are_told_by_the_config(theirs, tmp_path, angles, message):
    """No tensor tells them, so that the numbers would be wrong without a word."""
    theirs.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {"rope_parameters": angles}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"expected an ESM-C with {message}"):
        RDModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 3), ("hidden_size", 48)])
def test_tensors_of_another_shape_than_the_config_states_are_refused(theirs, tmp_path, key, value):
    """Such as a file that ends before the last layer."""
    theirs.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"expected a model with {key} {value}, as config.json says, got"):
        RDModel.from_pretrained(tmp_path)


def test_tensors_that_are_missing_or_left_over_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    missing = {name: part for name, part in whole.items() if "1.self_attn.k_norm" not in name}
    for tensors in (missing, {**whole, "esmc.layers.0.self_attn.q_proj.bias": torch.zeros(64)}):
        save_file(tensors, tmp_path / "new.safetensors")
        (tmp_path / "new.safetensors").replace(path)
        with pytest.raises(ValueError, match=r"(?s)expected the tensors of level .*, got others"):
            RDModel.from_pretrained(tmp_path)


def test_a_size_has_its_shape(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    chain = RDModel({"300M": ESMC(1, 960, 15)}, [])
    chain.save_pretrained(tmp_path / "chain")
    with pytest.raises(ValueError, match=r"expected the 300M of ESM-C, 30 layers of width 960, got 2 layers"):
        RDModel.from_pretrained(tmp_path / "chain", backbones={"300M": tmp_path})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_chains_are_saved_and_loaded_to_the_bit(tmp_path, tokens, dtype):
    backbones = {name: our_esmc(2, width, 2, seed) for seed, (name, width) in enumerate(
        {"a": 32, "b": 48}.items()
    )}  # fmt: skip
    model = RDModel(backbones, random_stages(widths={"a": 32, "b": 48})).eval().to(dtype)
    model.save_pretrained(tmp_path)
    again = RDModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert [level.family for level in again.config.levels] == ["esmc", "esmc"]
    assert again.fingerprint() == model.fingerprint()
    for mine, other in zip(
        (again(tokens).embeddings, again(tokens).logits),
        (model(tokens).embeddings, model(tokens).logits),
        strict=True,
    ):
        # In float64 PyTorch's products depend on where in memory their factors lie, by a last digit.
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12 if dtype == torch.float64 else 0)


def test_another_feed_forward_width_is_a_fact_of_the_checkpoint(tmp_path, tokens):
    model = RDModel({"narrow": ESMC(2, 32, 2, hidden_dim=96)}, []).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["levels"][0]["facts"] == {"hidden_dim": 96}
    assert torch.equal(RDModel.from_pretrained(tmp_path)(tokens).embeddings, model(tokens).embeddings)


STATED = {
    "ESM-C": lambda: our_esmc(2, 32, 2),
    "a narrower feed-forward block": lambda: ESMC(2, 32, 2, hidden_dim=96).eval(),
    "no token dropout": lambda: ESM2(2, 32, 4, token_dropout=False).eval(),
    "a head of its own": lambda: ESM2(2, 32, 4, tied=False).eval(),
}


@pytest.mark.parametrize("make", STATED.values(), ids=[*STATED])
@pytest.mark.parametrize("place", ["", "backbones/small.safetensors"], ids=["the folder", "the file"])
def test_what_our_checkpoint_states_of_a_level_holds_wherever_it_is_taken_from(make, place, tmp_path):
    backbone = make()
    RDModel({"small": backbone}, []).save_pretrained(tmp_path / "chain")
    tokens = torch.tensor([[0, 20, 32, 15, 5, 2], [0, 20, 2, 1, 1, 1]])
    with torch.no_grad():
        expected = RDModel({"small": backbone}, []).eval()(tokens)
    source = tmp_path / "chain" / place
    taken = rd_torch.fit({"small": str(source)}, ["MKTAY", "ACDEF"])
    other = RDModel({"small": make()}, [])
    other.save_pretrained(tmp_path / "other")
    given = RDModel.from_pretrained(tmp_path / "other", backbones={"small": source})
    for model in (taken, given):
        assert model.config.levels[0].facts == backbone.facts
        out = model(tokens)
        assert torch.equal(out.embeddings, expected.embeddings)
        assert torch.equal(out.logits, expected.logits)
