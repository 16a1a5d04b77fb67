import copy
import dataclasses

import pytest
import torch
from helpers import SHAPES, WIDTHS, any_size, random_esm2, random_stages, small_model, tokens_of
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from rd_torch import RDModel
from rd_torch.levels import ALPHABET

LEVELS = [*SHAPES]
PAD = ALPHABET.padding_idx

each_level = pytest.mark.parametrize("level", LEVELS)
each_source = pytest.mark.parametrize("predict_from", ["nested", "previous"])
each_rows = pytest.mark.parametrize("special_rows", ["maps", "larger"])


def raw_embeddings(model, tokens, **options):
    """`(batch, time, width)` of every backbone that a forward pass runs, by level."""
    raw, hooks = {}, []
    for name, part in model.backbones.items():

        def keep(_, args, out, name=name):
            raw[name] = args[1].unpack(out)

        hooks.append(part.register_forward_hook(keep))
    model(tokens, **options)
    for hook in hooks:
        hook.remove()
    return raw


def pooled(embeddings, mask):
    return (embeddings * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@each_level
@each_source
@torch.no_grad()
def test_prefixes_are_equal_to_the_bit_at_every_token(predict_from, level, tokens):
    model = small_model(predict_from)
    out, width = model(tokens), WIDTHS[level]
    prefix = out.embeddings[..., :width]
    assert out.embeddings.shape == (*tokens.shape, 64)
    assert torch.equal(out["representations"][level], prefix)
    assert out["representations"][level].data_ptr() == out.embeddings.data_ptr()
    assert torch.equal(model(tokens, width=width).embeddings, prefix)
    assert torch.equal(model.encode(tokens, width=width), prefix)
    assert torch.equal(model.truncate(level)(tokens).embeddings, prefix)
    assert prefix[tokens != PAD].abs().amax(-1).min() > 0


@pytest.mark.parametrize(
    ("width", "levels"), [(1, "a"), (31, "a"), (32, "a"), (33, "ab"), (48, "ab"), (49, "abc"), (None, "abc")]
)
def test_a_width_cuts_and_runs_only_the_backbones_it_needs(model, tokens, width, levels):
    whole = model(tokens)
    out = model(tokens, width=width)
    assert [*raw_embeddings(model, tokens, width=width)] == list(levels)
    assert torch.equal(out.embeddings, whole.embeddings[..., :width])
    named = {name for name in out.representations if isinstance(name, str)}
    assert named == {name for name in levels if WIDTHS[name] <= (width or 64)}
    own = model.truncate(levels[-1])(tokens)
    assert torch.equal(out.logits, own.logits)


@each_source
@torch.no_grad()
def test_combine_is_forward_without_backbones_and_commutes_with_the_mean(predict_from, tokens):
    model = small_model(predict_from).double()
    raw, out = raw_embeddings(model, tokens), model(tokens)
    real, mask = tokens != PAD, out.residue_mask
    torch.testing.assert_close(model.combine(raw)[real], out.embeddings[real], rtol=0, atol=1e-12)
    kept = mask.any(1)  # a row of only masks has no mean
    means = {name: pooled(h, mask)[kept] for name, h in raw.items()}
    expected = pooled(out.embeddings, mask)[kept]
    torch.testing.assert_close(model.combine(means), expected, rtol=0, atol=1e-12)
    first = {"b": means["b"], "a": means["a"]}
    torch.testing.assert_close(model.combine(first), expected[:, :48], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "expected the first levels of a, b, c, got "),
        ({"a": 32, "c": 64}, "expected the first levels of a, b, c, got a, c"),
        ({"b": 48}, "expected the first levels of a, b, c, got b"),
        ({"a": 32, "b": 47}, "expected width 48 at level b, got 47"),
    ],
)
def test_combine_refuses_other_levels_and_widths(model, widths, message):
    with pytest.raises(ValueError, match=message):
        model.combine({name: torch.zeros(3, width) for name, width in widths.items()})


@pytest.mark.parametrize("rows", [(1,), (), (2,), (1, 3)])
def test_combine_refuses_other_numbers_of_rows(model, rows):
    """One row would else be taken for all."""
    message = r"expected shape \(3, 48\) at level b, as many rows as at level a, got \("
    with pytest.raises(ValueError, match=message):
        model.combine({"a": torch.zeros(3, 32), "b": torch.zeros(*rows, 48)})


@each_source
@torch.no_grad()
def test_forward_is_the_formula_of_the_paper(predict_from, tokens):
    """`previous` predicts from the previous backbone's raw embedding instead of the nested one."""
    model = small_model(predict_from).double()
    raw = raw_embeddings(model, tokens)
    nested = previous = raw["a"]
    for level in "bc":
        stage = model.stages[level]
        source = nested if predict_from == "nested" else previous
        residual = raw[level] - (source @ stage.W + stage.b)
        nested = torch.cat((nested, (residual - stage.m) @ stage.V), dim=-1)
        previous = raw[level]
    real = tokens != PAD
    torch.testing.assert_close(model(tokens).embeddings[real], nested[real], rtol=0, atol=1e-12)


@torch.no_grad()
def test_larger_rows_replace_only_the_special_rows_of_the_widest_returned_level(tokens):
    maps, model = small_model(), small_model(special_rows="larger")
    special = (tokens != PAD) & ~model(tokens).residue_mask
    for width, level in ((None, "c"), (64, "c"), (56, "c"), (48, "b"), (40, "b"), (32, "a")):
        out, plain = model(tokens, width=width), maps(tokens, width=width)
        own = raw_embeddings(model, tokens)[level][..., :width]
        assert torch.equal(out.embeddings[special], own[special])
        assert torch.equal(out.embeddings[~special], plain.embeddings[~special])
        for name, size in WIDTHS.items():
            if size < plain.embeddings.shape[-1]:
                assert torch.equal(out.representations[name], plain.embeddings[..., :size])
        for same in (model.encode(tokens, width=width), model.truncate(level).encode(tokens, width=width)):
            assert torch.equal(same, out.embeddings)
        for key in {model.num_layers, level} & out.representations.keys():
            assert torch.equal(out.representations[key], out.embeddings)


@each_rows
def test_nothing_stands_at_padding_and_padding_changes_nothing(special_rows, tokens):
    model = small_model(special_rows=special_rows)
    wider = torch.cat((tokens, torch.full((len(tokens), 7), PAD)), dim=1)
    wider = torch.cat((wider, torch.full((2, wider.shape[1]), PAD)))
    out, same = model(wider), model(tokens)
    padding = wider == PAD
    assert not out.embeddings[padding].any()
    assert not out.logits[padding].any()
    assert not out.residue_mask[padding].any()
    for ours, alone in ((out.embeddings, same.embeddings), (out.logits, same.logits)):
        torch.testing.assert_close(ours[:-2, :-7], alone, rtol=0, atol=2e-5 * alone.std().item())


def test_residue_mask_is_true_at_ids_4_to_28(model):
    assert model(torch.arange(33)[None]).residue_mask[0].nonzero().flatten().tolist() == [*range(4, 29)]
    letters = [ALPHABET.get_tok(token) for token in range(4, 29)]
    assert sorted(letters) == sorted("ACDEFGHIKLMNPQRSTVWYXBUZO")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_gives_empty_tensors(model, shape):
    out = model(torch.zeros(shape, dtype=torch.long))
    assert out.embeddings.shape == (*shape, 64)
    assert out.logits.shape == (*shape, 33)


def test_output_answers_to_fair_esms_keys(model, tokens):
    out = model(tokens)
    assert list(out.keys()) == list(out) == ["embeddings", "logits", "residue_mask", "representations"]
    assert "logits" in out
    assert "contacts" not in out
    assert out["logits"] is out.logits
    with pytest.raises(KeyError, match=r"expected one of embeddings, logits, .*, got 'contacts'"):
        out["contacts"]
    full = model(tokens, return_contacts=True)
    assert {"attentions", "contacts"} <= set(full.keys())
    assert full["attentions"].shape == (5, 3, 4, *tokens.shape[1:] * 2)
    assert "attentions" in model(tokens, need_head_weights=True)
    with pytest.raises(dataclasses.FrozenInstanceError, match="logits"):
        out.logits = None


def test_repr_layers_lists_only_itself_and_names_stay_reachable(model, tokens):
    assert list(model(tokens).representations) == ["a", "b", "c", 3]
    shown = model(tokens, repr_layers=[3]).representations
    assert dict(shown).keys() == {3}
    assert len(shown) == 1
    assert shown["b"].shape[-1] == 48
    assert len(model(tokens, repr_layers=[]).representations) == 0
    with pytest.raises(KeyError, match="expected one of 'a', 'b', 'c', 3, got '650M'"):
        shown["650M"]


@pytest.mark.parametrize("layers", [[2], [0, 3], [-1]])
def test_a_hidden_layer_is_refused_with_the_reason(model, tokens, layers):
    with pytest.raises(
        ValueError, match=r"expected repr_layers among \[3\] or none.*have no reverse-distilled form"
    ):
        model(tokens, repr_layers=layers)


def test_the_model_answers_what_fair_esms_does(model):
    oracle = random_esm2(*SHAPES["c"])
    names = "num_layers embed_dim attention_heads alphabet_size padding_idx mask_idx cls_idx eos_idx"
    for name in (*names.split(), "prepend_bos", "append_eos"):
        assert getattr(model, name) == getattr(oracle, name)
    assert model.alphabet.all_toks == oracle.alphabet.all_toks


@torch.no_grad()
def test_contacts_and_logits_are_the_largest_backbones_own(model, tokens):
    oracle, batch = random_esm2(*SHAPES["c"], seed=2), tokens[[0, 1, 2, 4]]
    assert (model.predict_contacts(batch) - oracle.predict_contacts(batch)).abs().max() < 1e-4
    real = batch != PAD
    theirs = oracle(batch)["logits"][real]
    assert (model(batch).logits[real] - theirs).abs().max() < 2e-5 * theirs.std()


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "as a floating one, got torch.bool: use a batch"),
        ([[0, 5, 2]], TypeError, "expected tokens as an int64 or int32 tensor, or .*, got list"),
        (torch.tensor([0, 5, 2]), ValueError, r"expected tokens of shape \(batch, time\), got \(3,\)"),
        (torch.tensor([[0, 33]]), ValueError, "expected token ids from 0 to 32, got 0 to 33"),
        (torch.tensor([[-1, 5]]), ValueError, "expected token ids from 0 to 32, got -1 to 5"),
    ],
)
def test_wrong_tokens_are_refused(model, tokens, error, message):
    with pytest.raises(error, match=message):
        model(tokens)


@pytest.mark.parametrize("width", [0, -1, 65])
def test_an_unknown_width_is_refused_with_the_levels(model, tokens, width):
    with pytest.raises(ValueError, match=rf"from 1 to 64 \(levels: a 32, b 48, c 64\), got {width}"):
        model(tokens, width=width)


def test_an_unknown_level_is_refused_with_the_levels(model):
    with pytest.raises(ValueError, match="expected level to be one of 'a', 'b', 'c', got '35M'"):
        model.truncate("35M")


def test_stages_that_do_not_fit_the_backbones_are_refused():
    backbones = {name: random_esm2(*shape) for name, shape in SHAPES.items()}
    stages = random_stages()
    with pytest.raises(ValueError, match="expected one stage fewer than the 3 levels, got 1"):
        RDModel(backbones, stages[:1])
    with pytest.raises(ValueError, match=r"expected .*'W': \(32, 48\).* in the stage that leads to b"):
        RDModel(backbones, stages[::-1])
    with pytest.raises(ValueError, match=r"'W': \(48, 64\).* leads to c, got .*'W': \(52, 64\)"):
        RDModel(backbones, random_stages(added=[20, 12]), predict_from="previous")
    with pytest.raises(ValueError, match=r'expected special_rows="maps", got "larger", .* at b, c'):
        RDModel(backbones, random_stages(added=[20, 20]), special_rows="larger")
    with pytest.raises(ValueError, match="expected predict_from to be one of 'nested', 'previous'"):
        RDModel(backbones, stages, predict_from="both")
    with pytest.raises(TypeError, match=r"expected a backbone of rd_torch or an esm.ESM2, got Linear"):
        RDModel({"a": nn.Linear(2, 2)}, [])


@torch.no_grad()
def test_a_family_whose_widths_do_not_grow_nests_with_added_directions(tokens):
    backbones = {name: random_esm2(2, 32, 4, seed=k) for k, name in enumerate(LEVELS)}
    model = RDModel(backbones, random_stages(widths=dict.fromkeys(LEVELS, 32), added=[5, 32]))
    assert model(tokens).embeddings.shape[-1] == model.embed_dim == 69
    assert torch.equal(model(tokens, width=37).embeddings, model.truncate("b")(tokens).embeddings)


def frozen_bits(model):
    """Maps and inv_freq by name: what no half type may touch."""
    names = ("W", "b", "m", "V", "inv_freq")
    return {name: part.clone() for name, part in model.named_buffers() if name.split(".")[-1] in names}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_maps_and_inv_freq_never_pass_through_a_half_type(model, tokens, half):
    before = frozen_bits(model)
    assert len(before) == 2 * 4 + 7
    out = model.to(half)(tokens)
    assert out.embeddings.dtype == torch.float32
    assert out.embeddings.isfinite().all()
    assert {p.dtype for p in model.parameters()} == {half}
    for changed in (model.half(), model.bfloat16(), model.float()):
        assert all(torch.equal(part, before[name]) for name, part in frozen_bits(changed).items())
    doubled = frozen_bits(model.double())
    assert {part.dtype for part in doubled.values()} == {torch.float64}
    assert model(tokens).embeddings.dtype == torch.float64


@torch.no_grad()
def test_under_bfloat16_and_autocast_stages_run_in_float32_and_all_stays_near_it(model, tokens):
    real = tokens != PAD
    exact, raw = model(tokens).embeddings[real], raw_embeddings(model, tokens)
    nested = model.combine(raw)
    torch.testing.assert_close(nested.double(), copy.deepcopy(model).double().combine(raw), rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens).embeddings
        assert torch.equal(model.combine(raw), nested)
    half = model.to(torch.bfloat16)(tokens).embeddings
    assert cast.dtype == half.dtype == torch.float32
    for out in (cast[real], half[real]):
        assert 0 < (out - exact).std() / exact.std() < 0.1


def test_heads_are_frozen_and_everything_else_trains():
    reference = random_esm2(*SHAPES["a"])
    reference.layers[0].requires_grad_(False)
    backbones = {"a": reference, "b": random_esm2(*SHAPES["b"])}
    model = RDModel(backbones, random_stages()[:1])
    for name, parameter in model.named_parameters():
        frozen = "_head." in name or name.startswith("backbones.a.layers.0.")
        assert parameter.requires_grad == (not frozen), name
    assert all(backbone.embed_tokens.weight.requires_grad for backbone in model.backbones.values())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert model.freeze_backbones() is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


@each_source
def test_gradients_reach_every_trainable_parameter(predict_from, tokens):
    model = small_model(predict_from).double()
    model(tokens).embeddings.sum().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trainable} == set(LEVELS)
    # Adding one vector to all keys of a head moves no softmax, so a key's bias has no gradient but rounding.
    reached = {name for name, parameter in trainable.items() if parameter.grad.abs().max() > 1e-9}
    assert {name for name in trainable if name not in reached} <= {n for n in trainable if "k_proj.bias" in n}


def test_gradients_are_finite_with_rows_of_padding_and_of_masks(model, tokens):
    batch = torch.cat((tokens, torch.full((1, tokens.shape[1]), PAD), torch.full((1, tokens.shape[1]), 32)))
    model(batch).embeddings.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_backbones_are_shared_with_fair_esm_and_truncations(model):
    reference = random_esm2(*SHAPES["a"])
    shared = RDModel({"a": reference}, []).backbones["a"]
    assert shared.embed_tokens.weight.data_ptr() == reference.embed_tokens.weight.data_ptr()
    small = model.truncate("b")
    assert small.backbones["b"] is model.backbones["b"]
    assert small.stages["b"] is model.stages["b"]
    assert [*small.backbones] == ["a", "b"]
    assert not small.training
    assert (small.embed_dim, small.num_layers) == (48, 2)


@torch.no_grad()
def test_a_state_dict_makes_another_model_the_same(model, tokens):
    stages = [copy.deepcopy(stage) for stage in random_stages(seed=9)]
    other = RDModel({name: random_esm2(*shape, seed=7) for name, shape in SHAPES.items()}, stages).eval()
    expected = model(tokens)
    assert not torch.equal(other(tokens).embeddings, expected.embeddings)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).embeddings, expected.embeddings)
    assert torch.equal(other(tokens).logits, expected.logits)


@each_rows
@each_source
@torch.no_grad()
def test_a_saved_model_comes_back_to_the_bit(predict_from, special_rows, tokens, tmp_path):
    model = small_model(predict_from, special_rows)
    model.save_pretrained(tmp_path)
    again = RDModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(part, states[1][name]) for name, part in states[0].items())
    views = again(tokens).representations
    assert all(torch.equal(views[key], view) for key, view in model(tokens).representations.items())
    assert RDModel.from_pretrained(tmp_path, dtype=torch.float16).stages["b"].W.dtype == torch.float32


@torch.no_grad()
def test_a_level_loads_without_the_files_above_it(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "backbones" / "c.safetensors").unlink()
    small = RDModel.from_pretrained(tmp_path, level="b")
    assert torch.equal(small(tokens).embeddings, model(tokens, width=48).embeddings)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file .*c\.safetensors, got nothing"):
        RDModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected level to be one of 'a', 'b', 'c', got 'd'"):
        RDModel.from_pretrained(tmp_path, level="d")


def assert_agrees(out, eager):
    for name in ("embeddings", "logits"):
        ours, theirs = out[name], eager[name]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.std().item())
    assert torch.equal(out.residue_mask, eager.residue_mask)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_compiled_model_is_one_graph_and_agrees_with_eager(backend, tokens):
    model = small_model(special_rows="larger").truncate("b")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch in (tokens, tokens[:3, :9].contiguous()):  # a view would be traced anew
        assert_agrees(compiled(batch), model(batch))


@pytest.mark.parametrize("options", [{}, {"width": 48}, {"width": 20}], ids=str)
@torch.no_grad()
def test_the_exported_model_takes_any_batch_and_time(model, tokens, options):
    shapes = {"tokens": {0: any_size("batch"), 1: any_size("time")}}
    shapes |= dict.fromkeys(options)
    program = torch.export.export(model, (tokens,), options, dynamic_shapes=shapes).module()
    for batch in (tokens, tokens_of("MKTAYIAKQRQISFVKSHFSRQ<mask>EERLGLI"), tokens[:, :6].repeat(2, 1)):
        assert_agrees(program(batch, **options), model(batch, **options))


@pytest.mark.parametrize("options", [{}, {"return_contacts": True}, {"repr_layers": [3]}], ids=str)
@pytest.mark.parametrize("special_rows", ["maps", "larger"])
def test_an_output_taken_apart_is_its_tensors_each_once(tokens, special_rows, options):
    """What graphs return: with a constant or one tensor twice among it no ONNX file runs."""
    out = small_model(special_rows=special_rows)(tokens, **options)
    leaves, spec = tree_flatten(out)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    again = tree_unflatten(leaves, treespec_loads(treespec_dumps(spec)))
    for field in dataclasses.fields(out):
        ours, theirs = (getattr(each, field.name) for each in (again, out))
        assert ours is theirs or ours == theirs, field.name
