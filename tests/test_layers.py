"""Levels that name their layer: hidden states of fair-esm and transformers, runs that stop, every door."""

import copy
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from esmc import oracle as esmc_oracle
from esmc import our_esmc, random_esmc
from foreign import bert, bert_tokenizer
from helpers import layered_model as chain
from helpers import random_esm2, random_sequence, random_stages, tokens_of
from safetensors import safe_open

import rd_torch
from rd_torch import Level, Nesting, RDModel, TransformersBackbone, TransformersEncoder, hardware
from rd_torch.backbone import ESM2, Packing, Taken, as_family, engine, run_backbones
from rd_torch.backbone.engine import Engine
from rd_torch.cli import main
from rd_torch.levels import ALPHABET

TOLERANCE = 2e-5
BATCH = ("MKTAYIA<mask>QRQISFVK", "M", random_sequence(40, 2), "MXBUZOA")
PROTEINS = [(f"p{k}", random_sequence(15 + 5 * (k % 7), seed=k)) for k in range(12)]
LEVELS = ("a", "b@2", "b@4", "b")
each_norm = pytest.mark.parametrize("final_norm", [True, False])


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def packing_of(tokens):
    return Packing.of(tokens != ALPHABET.padding_idx)


@pytest.fixture
def calls():
    """How often each module was called, by its name in the chain."""
    found = {}

    def watch(model):
        for name, part in model.named_modules():
            part.register_forward_hook(lambda *_, name=name: found.update({name: found.get(name, 0) + 1}))
        return found

    return watch


@each_norm
@torch.no_grad()
def test_every_layer_of_esm2_is_fair_esms(final_norm):
    theirs, tokens = random_esm2(5, 48, 4), tokens_of(*BATCH)
    real = tokens != ALPHABET.padding_idx
    expected = theirs(tokens, repr_layers=range(6))["representations"]
    taken = Taken((1, 2, 3, 4, 5), final_norm)
    packing = packing_of(tokens)
    for layer, state in zip(taken.layers, ESM2.sharing(theirs)(tokens, packing, taken=taken), strict=True):
        oracle = expected[layer][real]
        if final_norm and layer < 5:
            oracle = theirs.emb_layer_norm_after(oracle)
        error = (packing.unpack(state)[real] - oracle).abs().max() / oracle.std()
        assert error <= TOLERANCE, f"layer {layer} is {error:.1g} off"


@each_norm
@torch.no_grad()
def test_every_layer_of_esmc_is_transformers(final_norm):
    esmc_oracle()
    theirs, ours = random_esmc(4, 48, 4), our_esmc(4, 48, 4)
    tokens = tokens_of(*BATCH)
    real, states = tokens != ALPHABET.padding_idx, []
    hooks = [part.register_forward_hook(lambda *call: states.append(call[-1])) for part in theirs.esmc.layers]
    theirs.esmc(tokens, attention_mask=real.long())
    for hook in hooks:
        hook.remove()
    packing = packing_of(tokens)
    for ours_cut in (
        ours,
        ours.until(3),
    ):  # the share of a branch goes by all layers, also where few are left
        found = ours_cut(tokens, packing, taken=Taken((1, 2, 3), final_norm))
        for state, oracle in zip(found, states, strict=False):
            expected = theirs.esmc.norm(oracle[real]) if final_norm else oracle[real]
            error = (packing.unpack(state)[real] - expected).abs().max() / expected.std()
            assert error <= TOLERANCE


@each_norm
@torch.no_grad()
def test_layers_of_transformers_models_are_its_hidden_states(final_norm, tmp_path):
    model, tokenizer = bert(layers=3), bert_tokenizer(tmp_path)
    backbone = TransformersBackbone(model, tokenizer)
    model_chain = RDModel({"x@1": backbone, "x": backbone}, [identity_stage(32, 32)], final_norm=final_norm)
    tokens = model_chain.alphabet.get_batch_converter()([("", s) for s in ("MKTAYIA", "M", "MKVAA")])[2]
    real = tokens != model_chain.padding_idx
    states = model(tokens, attention_mask=real.long(), output_hidden_states=True).hidden_states
    nested = model_chain(tokens).embeddings[real]
    expected = torch.cat([states[1][real], states[3][real]], -1)
    assert (nested - expected).abs().max() <= TOLERANCE * expected.std()


def identity_stage(p, q):
    """A stage that adds the larger embedding as it is."""
    return rd_torch.Stage(torch.zeros(p, q), torch.zeros(q), torch.zeros(q), torch.eye(q))


@each_norm
@torch.no_grad()
def test_prefixes_are_equal_to_the_bit_whatever_runs(final_norm, tokens):
    model = chain(final_norm=final_norm)
    out = model(tokens)
    assert model.config.widths == {"a": 32, "b@2": 48, "b@4": 64, "b": 80}
    for level, width in model.config.widths.items():
        prefix = out.embeddings[..., :width]
        assert torch.equal(out["representations"][level], prefix)
        assert torch.equal(model(tokens, width=width).embeddings, prefix)
        assert torch.equal(model.truncate(level)(tokens).embeddings, prefix)


@each_norm
@torch.no_grad()
def test_a_hidden_layer_is_what_the_formula_says(final_norm, tokens, monkeypatch):
    """The chain of raw hidden states that the oracle computes, nested by hand in float64, by either path."""
    model = chain(("a", "b@2"), final_norm=final_norm)
    a, b = random_esm2(2, 32, 4), random_esm2(5, 48, 4, seed=1)
    x = a(tokens, repr_layers=[2])["representations"][2].double()
    y = b(tokens, repr_layers=[2])["representations"][2]
    y = (b.emb_layer_norm_after(y) if final_norm else y).double()
    stage = random_stages(widths={"a": 32, "b": 48}, added=16)[0]
    expected = torch.cat([x, (y - x @ stage.W - stage.b - stage.m) @ stage.V], -1)
    real = tokens != ALPHABET.padding_idx
    assert (model(tokens).embeddings[real] - expected[real]).abs().max() <= 1e-4
    monkeypatch.setattr(engine, "_compile_parts", lambda kind: (kind.begin, kind.finish))
    monkeypatch.setattr(hardware, "has_engine", lambda device: True)
    assert model.prepare_inference()._prepared._engine is not None
    assert (model(tokens).embeddings[real] - expected[real]).abs().max() <= 1e-4


def test_a_backbone_runs_once_and_stops_at_the_last_layer_that_is_needed(calls, tokens):
    model = chain(("a", "b@2", "b@4"))
    count = calls(model)
    model(tokens)
    assert [len(model.backbones[name].layers) for name in ("a", "b")] == [2, 4]
    assert count["backbones.a"] == count["backbones.b"] == 1
    assert [count[f"backbones.b.layers.{layer}"] for layer in range(4)] == [1] * 4
    count.clear()
    model(tokens, width=48)
    ran = [name for name in count if name.startswith("backbones.b.layers.") and name.count(".") == 3]
    assert ran == ["backbones.b.layers.0", "backbones.b.layers.1"]
    count.clear()
    model(tokens, width=32)
    assert "backbones.b" not in count


def test_layers_above_are_no_part_of_the_chain():
    whole, cut = chain(("a", "b")), chain(("a", "b@2"))
    assert not any(".layers.2." in name for name in cut.state_dict())
    assert not any(
        "backbones.b.lm_head" in name or "contact" in name
        for name, _ in cut.backbones["b"].named_parameters()
    )
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    shared = chain(("a", "b@2")).backbones["b"]
    assert shared.num_layers == 5
    assert shared.depth == 2
    part = whole.backbones["b"].until(2)
    assert part.layers[1] is whole.backbones["b"].layers[1]  # nothing is copied


def test_what_drop_in_code_asks_stays(tokens):
    model = chain(("a", "b@2", "b@4"))
    assert model.num_layers == 5
    out = model(tokens, repr_layers=[model.num_layers])
    assert torch.equal(out["representations"][5], out.embeddings)
    out = model(tokens, repr_layers=[2, 4, 5])
    assert list(out["representations"]) == [2, 4, 5]
    assert torch.equal(out["representations"][2], out.embeddings[..., :48])
    assert torch.equal(out["representations"][4], out.embeddings)
    with pytest.raises(ValueError, match=r"expected repr_layers among \[2, 4, 5\] or none, got \[3\]"):
        model(tokens, repr_layers=[3])
    with pytest.raises(ValueError, match="repr_layers among"):
        model(tokens, repr_layers=[4], width=48)  # which does not run
    assert "logits" not in out
    assert model(tokens, need_head_weights=True).attentions.shape[1] == 4
    with pytest.raises(ValueError, match="contact head needs all layers"):
        model(tokens, return_contacts=True)


def test_logits_and_contacts_are_there_where_the_last_layer_is_a_level(tokens):
    model = chain()
    out = model(tokens, return_contacts=True)
    alone = RDModel({"b": random_esm2(5, 48, 4, seed=1)}, []).eval()(tokens, return_contacts=True)
    assert torch.equal(out["logits"], alone["logits"])
    assert torch.equal(out["contacts"], alone["contacts"])
    assert "logits" not in model(tokens, width=64)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (("b@6",), "reaches layer 6, which level b@6 takes, got one of 5 layers"),
        (("b@0",), "number of a layer behind @"),
        (("b@",), "number of a layer behind @"),
        (("b@two",), "number of a layer behind @"),
        (("@2",), "number of a layer behind @"),
        (("b@5", "b"), "each layer once, got layer 5 as b@5 and b"),
        (("b@4", "b@2"), "levels of one backbone by depth, got b@4 before b@2"),
        (("b@2", "a", "b@4"), "levels of one backbone next to each other"),
    ],
)
def test_levels_that_cannot_be_are_refused(levels, message):
    modules = {"a": random_esm2(2, 32, 4), "b": random_esm2(5, 48, 4)}
    family = {name: modules["a" if name == "a" else "b"] for name in levels}
    sizes = [32 if name == "a" else 48 for name in levels]
    stages = [identity_stage(sum(sizes[:k]), size) for k, size in enumerate(sizes) if k]
    with pytest.raises(ValueError, match=message):
        RDModel(family, stages)


def test_two_modules_for_one_backbone_are_refused():
    with pytest.raises(ValueError, match="one module for all levels of b, got another for b@4"):
        as_family({"b@2": random_esm2(5, 48, 4), "b@4": random_esm2(5, 48, 4)})


def test_a_cut_backbone_is_refused_where_the_last_layer_is_wanted():
    cut = chain(("a", "b@2")).backbones["b"]
    with pytest.raises(
        ValueError, match="reaches layer 5, which level b takes, got one of 2 layers, the first of 5"
    ):
        RDModel({"b": cut}, [])
    assert RDModel({"b@1": cut}, []).backbones["b"].depth == 1


@each_norm
@pytest.mark.parametrize("levels", [("a", "b@2"), ("a", "b@2", "b@4"), LEVELS])
def test_saved_and_loaded_to_the_bit(levels, final_norm, tokens, tmp_path):
    model = chain(levels, final_norm=final_norm)
    model.save_pretrained(tmp_path / "saved")
    loaded = RDModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).embeddings, model(tokens).embeddings)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.config == model.config
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored.get("final_norm", True) == final_norm
    assert sorted(path.name for path in (tmp_path / "saved" / "backbones").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]
    first = RDModel.from_pretrained(tmp_path / "saved", level="b@2")
    assert first.fingerprint() == model.truncate("b@2").fingerprint()
    assert torch.equal(first(tokens).embeddings, model(tokens, width=48).embeddings)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| b@2 | 2 of 5 |" in card
    assert ("the backbone's final LayerNorm" if final_norm else "no LayerNorm") in card


def test_a_file_holds_no_layer_above_and_none_is_read(tmp_path, monkeypatch):
    chain(("a", "b@2")).save_pretrained(tmp_path / "cut")
    with safe_open(tmp_path / "cut" / "backbones" / "b.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any(
        name.startswith(("layers.2", "layers.3", "layers.4", "lm_head", "contact")) for name in names
    )
    chain(("a", "b")).save_pretrained(tmp_path / "whole")
    read = []
    import rd_torch.weights.backbone as reading

    convert = reading._convert
    monkeypatch.setattr(reading, "_convert", lambda name, *rest: read.append(name) or convert(name, *rest))
    model = RDModel.from_pretrained(tmp_path / "whole" / "backbones" / "b.safetensors", level="b@3")
    assert model.config.levels == (Level("b@3", 5, 48, 4),)
    assert {name.split(".")[1] for name in read if name.startswith("layers.")} == {"0", "1", "2"}
    assert not any("head" in name for name in read)
    with pytest.raises(
        ValueError, match="reaches layer 5, which level 1M takes, got one of the first 2 layers of 5"
    ):
        RDModel.from_pretrained(
            "esm2-rd-mini", backbones={"1M": tmp_path / "cut" / "backbones" / "b.safetensors"}
        )


def test_a_backbone_that_was_cut_is_a_model_as_far_as_it_goes(tokens, tmp_path):
    model = chain(("a", "b@4"))
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "backbones" / "b.safetensors"
    alone = RDModel.from_pretrained(file)
    assert list(alone.config.widths) == ["b@4"]
    assert alone.fingerprint() == RDModel({"b@4": model.backbones["b"]}, []).fingerprint()
    assert RDModel.from_pretrained(file, level="b@2").backbones["b"].depth == 2
    for level in ("b@5", "b"):
        with pytest.raises(ValueError, match="expected level to be one of 'b@4'"):
            RDModel.from_pretrained(file, level=level)
    assert RDModel.from_pretrained(tmp_path / "cut", level="a@1").backbones["a"].depth == 1


def test_a_single_backbone_is_taken_at_any_layer(tokens, tmp_path):
    whole = RDModel({"b": random_esm2(5, 48, 4)}, []).eval()
    whole.save_pretrained(tmp_path / "b")
    named = RDModel.from_pretrained(tmp_path / "b", level="b@3")
    asked = RDModel.from_pretrained(tmp_path / "b", layers={"b": 3})
    made = RDModel({"b@3": whole.backbones["b"]}, []).eval()
    assert torch.equal(named(tokens).embeddings, made(tokens).embeddings)
    assert named.fingerprint() == asked.fingerprint() == made.fingerprint() != whole.fingerprint()
    assert list(RDModel.from_pretrained(tmp_path / "b", layers={"b": 5}).config.widths) == ["b"]
    with pytest.raises(ValueError, match=r"layer from 1 to 5, which b has, got b@9"):
        RDModel.from_pretrained(tmp_path / "b", level="b@9")
    with pytest.raises(ValueError, match="backbone to be one of 'b', got 'c'"):
        RDModel.from_pretrained(tmp_path / "b", layers={"c": 3})


def test_maps_are_not_used_for_a_layer_that_they_were_not_fitted_to():
    model = RDModel.from_pretrained("esm2-rd-mini", layers={"28K": 2, "1M": 6})
    assert model.fingerprint() == RDModel.from_pretrained("esm2-rd-mini").fingerprint()
    with pytest.raises(ValueError, match="a layer of 1M that the maps of the chain were fitted to, 6, got 4"):
        RDModel.from_pretrained("esm2-rd-mini", layers={"1M": 4})
    with pytest.raises(ValueError, match="level to be one of"):
        RDModel.from_pretrained("esm2-rd-mini", level="1M@4")
    first = RDModel.from_pretrained("esm2-rd-mini", level="28K@1")  # to which no map leads
    assert first.backbones["28K"].depth == 1


def test_chains_without_hidden_layers_are_what_they_were():
    """Digests of an earlier version, on which stores of users depend."""
    assert RDModel.from_pretrained("esm2-rd-mini").fingerprint() == "94d112c18db0ed4ebd4d7299f8a78de4"
    assert Nesting.from_pretrained("esm2-rd-mini").fingerprint() == "ee21074dd98465d030e90cb9be5d5c37"
    assert "final_norm" not in RDModel.from_pretrained("esm2-rd-mini").config.to_dict()


def test_the_engine_takes_hidden_layers_too(monkeypatch, tokens):
    monkeypatch.setattr(engine, "_compile_parts", lambda kind: (kind.begin, kind.finish))
    for final_norm in (True, False):
        model = chain(final_norm=final_norm)
        packing = packing_of(tokens)
        with torch.no_grad():
            expected = run_backbones(model.family(), tokens, packing, final_norm=final_norm)
        for count in (1, 2, 3, 4):
            raw = Engine(model.family(), final_norm=final_norm)(tokens, packing, count)
            assert list(raw) == list(expected)[:count]
            for level, state in raw.items():
                torch.testing.assert_close(state, expected[level], atol=2e-5, rtol=0)


def test_gradients_reach_the_layers_that_run(tokens):
    model = chain(("a", "b@2", "b@4"))
    model(tokens).embeddings.square().sum().backward()
    missing = [name for name, part in model.named_parameters() if part.requires_grad and part.grad is None]
    assert missing == []
    again = copy.deepcopy(model)
    again.zero_grad()
    again.gradient_checkpointing_enable()
    again(tokens).embeddings.square().sum().backward()
    for ours, other in zip(model.parameters(), again.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_freezing_goes_by_backbone_or_level():
    model = chain(("a", "b@2", "b@4")).freeze_backbones("b@2", except_top=1)
    parts = model.backbones["b"].layers.named_parameters()
    trains = {name.split(".")[0] for name, part in parts if part.requires_grad}
    assert trains == {"3"}
    assert not any(
        part.requires_grad for part in chain(("a", "b@2")).freeze_backbones("b").backbones["b"].parameters()
    )
    with pytest.raises(ValueError, match="level to be one of"):
        model.freeze_backbones("c")
    with pytest.raises(ValueError, match="except_top from 0 to 4"):
        model.freeze_backbones("b", except_top=5)


def test_transformers_door_saves_and_loads(tokens, tmp_path):
    encoder = TransformersEncoder(chain(("a", "b@2", "b@4"))).eval()
    encoder.save_pretrained(tmp_path)
    loaded = TransformersEncoder.from_pretrained(tmp_path).eval()
    got = loaded(input_ids=tokens).last_hidden_state
    assert torch.equal(got, encoder(input_ids=tokens).last_hidden_state)
    with pytest.raises(ValueError, match="language-model head"):
        rd_torch.TransformersForMaskedLM(chain(("a", "b@2")))


@each_norm
def test_stores_of_layers_are_combined_to_what_the_chain_gives(final_norm, tmp_path):
    model = chain(final_norm=final_norm)
    files = {}
    for level in model.config.widths:
        alone = RDModel({level: model.family()[level]}, [], final_norm=final_norm).eval()
        files[level] = tmp_path / f"{level}.h5"
        rd_torch.embed_to_store(alone, PROTEINS, files[level])
    assert rd_torch.open_store(files["b@2"]).layer == 2
    model.save_pretrained(tmp_path / "chain")
    nesting = Nesting.from_pretrained(tmp_path / "chain")
    rd_torch.combine_stores(nesting, files, tmp_path / "nested.h5")
    expected = rd_torch.embed(model, [sequence for _, sequence in PROTEINS])
    got = np.stack([rd_torch.open_store(tmp_path / "nested.h5")[name] for name, _ in PROTEINS])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.warns(UserWarning, match="12 means are too few"):
        fitted = rd_torch.fit_stores(files, added=4, regressor="ols")
    assert fitted.config.levels[1].depth == 2
    with pytest.raises(ValueError, match="expected embeddings of layer 4 at level b@4, got those of layer 2"):
        rd_torch.fit_stores({"b@4": files["b@2"]})
    fitted.save_pretrained(tmp_path / "maps")
    loaded = RDModel.from_pretrained(
        tmp_path / "maps", backbones={"a": model.backbones["a"], "b": model.backbones["b"]}
    )
    assert loaded.config.levels[1].num_layers == 5
    with pytest.raises(ValueError, match="expected embeddings of layer 4 at level b@4, got those of layer 2"):
        rd_torch.combine_stores(nesting, {**files, "b@4": files["b@2"]}, tmp_path / "wrong.h5")
    with pytest.raises(
        ValueError, match="expected embeddings of the last layer, 5, at level b, got those of layer 4"
    ):
        rd_torch.combine_stores(nesting, {**files, "b": files["b@4"]}, tmp_path / "wrong.h5")


def test_stores_with_and_without_the_final_norm_are_not_mixed(tmp_path):
    """They look alike: the same layer, width and records."""
    files = {}
    for final_norm in (True, False):
        model = chain(("a", "b@2"), final_norm=final_norm)
        model.save_pretrained(tmp_path / f"chain-{final_norm}")
        for level in model.config.widths:
            alone = RDModel({level: model.family()[level]}, [], final_norm=final_norm).eval()
            files[level, final_norm] = tmp_path / f"{level}-{final_norm}.h5"
            rd_torch.embed_to_store(alone, PROTEINS, files[level, final_norm], pool="none")
    normed, stream = ({level: files[level, norm] for level in ("a", "b@2")} for norm in (True, False))
    for norm, wrong in ((True, stream), (False, normed)):
        nesting = Nesting.from_pretrained(tmp_path / f"chain-{norm}")
        with pytest.raises(ValueError, match="final LayerNorm .* at level b@2"):
            rd_torch.combine_stores(nesting, wrong, tmp_path / "wrong.h5")
    assert rd_torch.fit_stores(normed, added=4, regressor="ols").config.final_norm
    fitted = rd_torch.fit_stores(stream, added=4, regressor="ols")
    assert not fitted.config.final_norm
    fitted.save_pretrained(tmp_path / "maps")
    parts = dict(chain(("a", "b@2")).backbones.items())
    loaded = RDModel.from_pretrained(tmp_path / "maps", backbones=parts).eval()
    rd_torch.combine_stores(fitted, stream, tmp_path / "nested.h5")
    expected = rd_torch.embed(loaded, [sequence for _, sequence in PROTEINS], pool="none")
    for (name, _), rows in zip(PROTEINS, expected, strict=True):
        np.testing.assert_allclose(rd_torch.open_store(tmp_path / "nested.h5")[name], rows, atol=1e-4)


def test_commands_take_layers(tmp_path):
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS))
    out = tmp_path / "chain"
    result = run("fit", fasta, "-o", out, "--levels", "28K,1M@2,1M@4", "--added", "16,16")
    assert result.exit_code == 0, result.output
    assert "2 of 6" in result.stdout
    parts = mini().backbones
    expected = rd_torch.fit(
        {"28K": parts["28K"], "1M@2": parts["1M"], "1M@4": parts["1M"]},
        [sequence for _, sequence in PROTEINS],
        added=16,
    )
    assert RDModel.from_pretrained(out).fingerprint() == expected.fingerprint()
    info = run("info", out)
    assert "4 of 6" in info.output
    assert "on hidden layers too" in info.output
    assert run("embed", fasta, "-o", tmp_path / "a.h5", "--model", out, "--level", "1M@2").exit_code == 0
    store = rd_torch.open_store(tmp_path / "a.h5")
    assert (store.width, store.layer, store.facts.levels) == (48, 2, ("28K", "1M@2"))
    assert run("embed", fasta, "-o", tmp_path / "b.h5", "--model", out, "--level", "1M").exit_code == 1
    refused = run("fit", fasta, "-o", tmp_path / "no", "--levels", "28K,1M@7")
    assert refused.exit_code == 1
    assert "layer 7" in refused.output


def mini():
    return RDModel.from_pretrained("esm2-rd-mini")


def test_one_file_serves_several_levels_and_is_read_once(tmp_path, monkeypatch):
    files = {}
    for name in ("28K", "1M"):
        RDModel({name: mini().backbones[name]}, []).save_pretrained(tmp_path / name)
        files[name] = str(tmp_path / name / "backbones" / f"{name}.safetensors")
    from rd_torch import fitting

    loads, load = [], fitting.load_backbone
    monkeypatch.setattr(
        fitting,
        "load_backbone",
        lambda source, hub, name, place: loads.append(name) or load(source, hub, name, place),
    )
    sequences = [sequence for _, sequence in PROTEINS]
    model = rd_torch.fit({"28K": files["28K"], "1M@2": files["1M"], "1M@4": files["1M"]}, sequences, added=16)
    assert loads == ["28K", "1M@4"]
    assert model.backbones["1M"].depth == 4
    with pytest.raises(ValueError, match="one source of the backbone of 1M@2 and 1M@4"):
        rd_torch.fit({"1M@2": files["1M"], "1M@4": "elsewhere"}, sequences)


def test_a_model_of_transformers_is_fitted_saved_and_loaded_at_a_layer(tmp_path):
    bert(tmp_path / "bert", layers=3, tokenizer=bert_tokenizer(tmp_path))
    source = f"hf:{tmp_path / 'bert'}"
    sequences = [sequence for _, sequence in PROTEINS]
    model = rd_torch.fit({"x@1": source, "x@2": source}, sequences, added=8)
    model.save_pretrained(tmp_path / "chain")
    loaded = RDModel.from_pretrained(tmp_path / "chain")
    np.testing.assert_array_equal(rd_torch.embed(loaded, sequences), rd_torch.embed(model, sequences))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.config.levels[-1].depth == 2
    alone = RDModel.from_pretrained(source, level="x@2")
    assert alone.config.levels[0].layer == 2


def test_verify_compares_hidden_layers(tmp_path):
    fasta, out = tmp_path / "p.fasta", tmp_path / "chain"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS))
    assert run("fit", fasta, "-o", out, "--levels", "28K,1M@2,1M@4", "--added", "16,16").exit_code == 0
    done = run("verify", "1M@4", "--model", out)
    assert done.exit_code == 0, done.output
    assert "pass  1M@2 against fair-esm: largest difference embeddings" in done.output
    assert "pass  prefix of 1M@2" in done.output
    with torch.no_grad():
        model = RDModel.from_pretrained(out)
        model.backbones["1M"].layers[3].fc2.bias.add_(0.1)
        expected = rd_torch.oracles.ORACLES["esm2"].run(model.backbones["1M"], tokens_of("MKV"))["embeddings"]
        got = RDModel({"1M@4": model.backbones["1M"]}, [])(tokens_of("MKV")).embeddings
    assert (got - expected).abs().max() <= TOLERANCE


def test_verify_compares_hidden_layers_of_esmc(tmp_path):
    esmc_oracle()
    RDModel({"tiny": our_esmc(4, 48, 4)}, []).save_pretrained(tmp_path / "tiny")
    done = run("verify", "tiny@2", "--model", tmp_path / "tiny")
    assert done.exit_code == 0, done.output
    assert "pass  tiny@2 against transformers" in done.output


def test_a_family_that_gives_its_last_layer_alone_says_so(tokens):
    class Own(rd_torch.Backbone):
        family, alphabet, embed_dim, num_layers, attention_heads = "own", ALPHABET, 4, 2, 1

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(33, 4)

        def forward(self, tokens, packing, sink=None):
            return self.table(packing.pack(tokens))

    with pytest.raises(
        ValueError, match="got one of own, which gives its last, 2, alone: it was asked for layer 1"
    ):
        RDModel({"x@1": Own()}, [])
    assert RDModel({"x@2": Own()}, [])(tokens).embeddings.shape[-1] == 4
