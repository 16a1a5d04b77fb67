"""ESM-2 from files that other people's code wrote: safetensors, sharded .bin, fair-esm's .pt."""

import json
import pickle
import sys

import pytest
import torch
from files import perturbed_esm2, rewrite, save_fair_esm, save_sharded_bin, transformers_model
from helpers import tokens_of
from safetensors.torch import load_file

import rd_torch
from benchmarks.speed import loading
from rd_torch.weights import read_checkpoint

SHAPE = (2, 64, 4)


@pytest.fixture(scope="module")
def fair():
    return perturbed_esm2(*SHAPE)


@pytest.fixture(scope="module")
def theirs(fair):
    return transformers_model(fair)


@pytest.fixture
def tokens():
    return tokens_of("MKTAYIAKQR<mask>QISFVKSHFSRQ<mask>", "XBUZOM", "ACDEFGHIKLMNPQRSTVWY")


def outputs(model, tokens):
    """Embeddings, logits and contacts of a chain of one level."""
    out = model(tokens, return_contacts=True)
    return out.embeddings, out.logits, out.contacts


def assert_equals_fair_esm(model, fair, tokens):
    with torch.no_grad():
        expected = fair(tokens, repr_layers=[fair.num_layers], return_contacts=True)
        got = outputs(model, tokens)
    real = tokens != 1
    for ours, name in zip(got, ("representations", "logits", "contacts"), strict=True):
        other = expected[name][fair.num_layers] if name == "representations" else expected[name]
        if name != "contacts":
            ours, other = ours[real], other[real]
        scale = other[other.isfinite()].std()
        torch.testing.assert_close(ours / scale, other / scale, atol=2e-5, rtol=0, equal_nan=True)


def assert_equals_transformers(model, theirs, tokens):
    """Row by row, for some versions of transformers scale padded batches with masks wrongly."""
    for row in tokens:
        row = row[row != 1][None]
        with torch.no_grad():
            hidden = theirs.esm(row, attention_mask=torch.ones_like(row)).last_hidden_state
            logits = theirs(row, attention_mask=torch.ones_like(row)).logits
            contacts = theirs.predict_contacts(row, torch.ones_like(row))
            got = outputs(model, row)
        for ours, expected in zip(got, (hidden, logits, contacts), strict=True):
            torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


def test_transformers_safetensors_give_transformers_outputs(fair, theirs, tokens, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = rd_torch.RDModel.from_pretrained(tmp_path)
    assert_equals_transformers(model, theirs, tokens)
    assert_equals_fair_esm(model, fair, tokens)


def test_sharded_bins_give_transformers_outputs(fair, theirs, tokens, tmp_path):
    save_sharded_bin(theirs, tmp_path)
    assert len(list(tmp_path.glob("pytorch_model-*.bin"))) > 1
    assert_equals_transformers(rd_torch.RDModel.from_pretrained(tmp_path), theirs, tokens)


def test_sharded_safetensors_load_too(fair, theirs, tokens, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_equals_fair_esm(rd_torch.RDModel.from_pretrained(tmp_path), fair, tokens)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_fair_esm_files_give_fair_esm_outputs(fair, tokens, tmp_path, half):
    save_fair_esm(fair, tmp_path / "tiny.pt", half=half)
    if half:
        fair = perturbed_esm2(*SHAPE).half().float()
        fair.contact_head.load_state_dict(perturbed_esm2(*SHAPE).contact_head.state_dict())
    model = rd_torch.RDModel.from_pretrained(tmp_path / "tiny.pt")
    assert model.backbones["tiny"].embed_tokens.weight.dtype == torch.float32
    assert_equals_fair_esm(model, fair, tokens)
    assert_equals_fair_esm(rd_torch.RDModel.from_pretrained(tmp_path), fair, tokens)


def test_without_the_regression_file_contacts_are_refused_and_the_rest_works(fair, tokens, tmp_path):
    save_fair_esm(fair, tmp_path / "tiny.pt", regression=False)
    model = rd_torch.RDModel.from_pretrained(tmp_path / "tiny.pt")
    expected = fair(tokens)["logits"]
    torch.testing.assert_close(model(tokens).logits[0], expected[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(
        RuntimeError, match="expected a backbone with this head, got one whose checkpoint has"
    ):
        model.predict_contacts(tokens)
    model.save_pretrained(tmp_path / "saved")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).embeddings, model(tokens).embeddings)


def test_a_model_without_language_model_head_gives_no_logits(theirs, tokens, tmp_path):
    theirs.esm.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith(("esm.", "lm_head")) for name in names)
    model = rd_torch.RDModel.from_pretrained(tmp_path)
    whole = theirs.esm(tokens[2:3, :-4]).last_hidden_state
    torch.testing.assert_close(model(tokens[2:3, :-4]).embeddings, whole, atol=5e-5, rtol=1e-4)
    assert model(tokens).logits is None
    assert "logits" not in model(tokens)


def test_angles_are_found_under_every_name_and_missing_ones_are_computed_with_a_warning(
    fair, theirs, tokens, tmp_path
):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: part for name, part in load_file(path).items() if not name.endswith("inv_freq")}
    inv_freq = fair.layers[0].self_attn.rot_emb.inv_freq
    per_layer = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
    for names in (
        ["esm.rotary_embeddings.inv_freq"],
        [per_layer.format("*")],
        [per_layer.format(layer) for layer in range(2)],
        ["rotary_embeddings.inv_freq"],
    ):
        rewrite({**tensors, **{name: inv_freq.clone() for name in names}}, path)
        assert_equals_fair_esm(rd_torch.RDModel.from_pretrained(tmp_path), fair, tokens)
    rewrite(tensors, path)
    with pytest.warns(UserWarning, match="no inv_freq, so it is computed anew"):
        model = rd_torch.RDModel.from_pretrained(tmp_path)
    (backbone,) = model.backbones.values()
    exact = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(backbone.layers[1].self_attn.rot_emb.inv_freq, exact)
    with pytest.raises(AssertionError):
        assert_equals_fair_esm(model, fair, tokens)


def test_every_source_serves_as_a_backbone_of_a_chain(fair, theirs, tokens, tmp_path):
    chain = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    other = perturbed_esm2(3, 48, 3, seed=5)
    transformers_model(other).save_pretrained(tmp_path / "hf")
    save_fair_esm(other, tmp_path / "file.pt")
    rd_torch.RDModel({"90K": other}, []).save_pretrained(tmp_path / "ours")
    sources = [
        other,
        rd_torch.ESM2.sharing(other),
        tmp_path / "hf",
        str(tmp_path / "hf" / "model.safetensors"),
        tmp_path / "file.pt",
        tmp_path / "ours",
    ]
    results = [
        rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K", backbones={"90K": source})
        for source in sources
    ]
    embeddings = [model(tokens).embeddings for model in results]
    assert all(torch.equal(each, embeddings[0]) for each in embeddings)
    assert not torch.equal(embeddings[0], chain(tokens, width=48).embeddings)
    with pytest.raises(ValueError, match="expected a backbone of shape .*width=64"):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini", backbones={"207K": tmp_path / "hf"})
    with pytest.raises(ValueError, match="level to be one of '28K', '90K', '207K', '1M', got '8M'"):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini", backbones={"8M": tmp_path / "hf"})


def test_a_given_module_is_shared_and_never_converted(tokens):
    module = perturbed_esm2(2, 32, 2)
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K", backbones={"28K": module})
    assert model.backbones["28K"].layers[0].fc1.weight is module.layers[0].fc1.weight
    half = rd_torch.RDModel.from_pretrained(
        "esm2-rd-mini", level="28K", backbones={"28K": module}, dtype=torch.bfloat16
    )
    assert half.backbones["28K"].layers[0].fc1.weight.dtype == torch.bfloat16
    assert module.layers[0].fc1.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_what_is_asked_but_angles_stay_exact(fair, theirs, tmp_path, dtype):
    theirs.save_pretrained(tmp_path)
    backbone = next(iter(rd_torch.RDModel.from_pretrained(tmp_path, dtype=dtype).backbones.values()))
    assert {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    angles = backbone.layers[1].self_attn.rot_emb.inv_freq
    assert angles.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(angles.float(), fair.layers[1].self_attn.rot_emb.inv_freq)


class Runs:
    """A pickle of it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, suffix, zipped):
    path, victim = tmp_path / f"bad{suffix}", tmp_path / "victim"
    content = {"model": {"encoder.sentence_encoder.embed_tokens.weight": Runs(str(victim))}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"that would run code .* nothing of it was run") as refused:
        rd_torch.RDModel.from_pretrained(path)
    assert "weights_only" not in str(refused.value)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"expected a whole file of tensors in .*bad"):
        rd_torch.RDModel.from_pretrained(path)
    assert not victim.exists()
    import argparse

    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("cut", [0, 1000, -100])
@pytest.mark.parametrize("name", ["model.safetensors", "tiny.pt", "pytorch_model.bin"])
def test_truncated_files_are_refused(fair, theirs, tmp_path, name, cut):
    path = tmp_path / name
    if name.endswith("safetensors"):
        theirs.save_pretrained(tmp_path)
    else:
        save_fair_esm(fair, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"expected a whole .*{name}"):
        rd_torch.RDModel.from_pretrained(path)


def edited(theirs, folder, **changes):
    """transformers' files with some facts of the config changed."""
    theirs.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [("position_embedding_type", "absolute"), ("emb_layer_norm_before", True), ("layer_norm_eps", 1e-12),
     ("vocab_size", 40), ("rope_theta", 20_000.0), ("is_decoder", True), ("model_type", "bert")],
)  # fmt: skip
def test_other_families_are_told_by_their_config(theirs, tmp_path, key, value):
    folder = edited(theirs, tmp_path, **{key: value})
    for place in (folder, folder / "model.safetensors"):  # the config beside a file counts as well
        with pytest.raises(ValueError, match=rf"expected an ESM-2 .*{key} .*, got {value!r}"):
            rd_torch.RDModel.from_pretrained(place)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_tensors_of_another_shape_than_their_config_states_are_refused(theirs, tmp_path, key):
    with pytest.raises(ValueError, match=f"expected a model with {key} 16, as config.json says, got"):
        rd_torch.RDModel.from_pretrained(edited(theirs, tmp_path, **{key: 16}))


def test_other_families_are_told_by_their_tensors(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    absolute = {name: part for name, part in tensors.items() if not name.endswith("inv_freq")}
    absolute["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 64)
    rewrite(absolute, path)
    with pytest.raises(ValueError, match=r"got a model with absolute positions in .*"):
        rd_torch.RDModel.from_pretrained(path)
    rewrite({**tensors, "esm.embeddings.layer_norm.weight": torch.ones(64)}, path)
    with pytest.raises(ValueError, match=r"(?s)got others: .*embeddings\.layer_norm\.weight"):
        rd_torch.RDModel.from_pretrained(path)
    rewrite({**tensors, "lm_head.decoder.weight": torch.ones(33, 64)}, path)
    with pytest.raises(ValueError, match="expected a language-model head that is tied to the embeddings"):
        rd_torch.RDModel.from_pretrained(path)
    rewrite({"bert.embeddings.word_embeddings.weight": torch.ones(4, 4)}, path)
    with pytest.raises(ValueError, match=r"expected an ESM-2 or an ESM-C in .*, got a file with bert\."):
        rd_torch.RDModel.from_pretrained(path)


def test_numbers_that_are_none_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = tensors["lm_head.dense.weight"].clone()
        broken[3, 5] = bad
        rewrite({**tensors, "lm_head.dense.weight": broken}, path)
        with pytest.raises(
            ValueError, match=r"expected finite numbers in .*, got NaN or infinity in lm_head"
        ):
            rd_torch.RDModel.from_pretrained(path)


def test_missing_shards_and_strange_indices_are_refused(theirs, tmp_path):
    save_sharded_bin(theirs, tmp_path)
    shard = sorted(tmp_path.glob("pytorch_model-*.bin"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected a checkpoint file .*{shard.name}, got nothing"):
        rd_torch.RDModel.from_pretrained(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.bin"}}))
    with pytest.raises(ValueError, match="expected shards beside"):
        rd_torch.RDModel.from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object in .*index.json, got list"):
        rd_torch.RDModel.from_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="expected an index of shards in"):
        rd_torch.RDModel.from_pretrained(tmp_path)


def test_a_renamed_file_is_told_by_its_shape(tmp_path):
    module = perturbed_esm2(6, 320, 20)
    save_fair_esm(module, tmp_path / "esm2_t12_35M_UR50D.pt")
    assert list(rd_torch.RDModel.from_pretrained(tmp_path).backbones) == ["8M"]
    from rd_torch.weights import find_backbone, read_level
    from rd_torch.weights.hub import Hub

    with pytest.raises(
        ValueError, match=r"expected the 35M of ESM-2, 12 layers of width 480, got 6 layers of width 320"
    ):
        read_level(find_backbone(tmp_path, Hub()), "35M")


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="got '.*no.pt'"):
        rd_torch.RDModel.from_pretrained(str(tmp_path / "no.pt"))
    with pytest.raises(
        FileNotFoundError, match="expected a file, a folder or a Hub id, got none of them: '.*no.pt'"
    ):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini", backbones={"28K": str(tmp_path / "no.pt")})
    for name in ("weights/esmc.pth", "hf:someone/model"):  # neither is looked for on the Hub
        with pytest.raises(FileNotFoundError, match=rf"expected a checkpoint's folder, .*, got '{name}'"):
            read_checkpoint(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file .*config.json"):
        rd_torch.RDModel.from_pretrained(tmp_path / "empty")


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_loading_takes_little_memory_and_less_time_than_fair_esm(tmp_path):
    """The benchmark of 650M in small; `benchmarks/results/loading.json` has the real one."""
    for row in loading.measure(tmp_path, rounds=1, shape=(6, 960, 20)):
        if row["library"] == "rd_torch":
            assert row["share of the tensors"] <= 1.3
            assert row["fair-esm's time over ours, load"] > 1  # at this size; 13 to 30 at 650M
