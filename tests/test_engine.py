"""The prepared engine: the modules' results, whatever the lengths, from parts compiled once a width."""

import copy
import json
import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHAPES, random_sequence, small_model, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from rd_torch import embed, embed_to_store, hardware, open_store
from rd_torch.backbone import engine, preparing
from rd_torch.backbone.engine import Engine, Inputs, Shape, Slot, shape_for
from rd_torch.backbone.esm2 import TransformerLayer, token_dropout
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.preparing import LIMITS, PROBES, Prepared
from rd_torch.levels import ALPHABET
from rd_torch.model import RDModel

BATCHES = [
    ("MKV", random_sequence(40)),
    (random_sequence(60, 1),),
    ("M", "MK<mask>L", random_sequence(36, 2)),
    (random_sequence(200, 3), random_sequence(3, 4)),
]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

on_cuda = pytest.mark.cuda


def packing_of(tokens):
    return Packing.of(tokens != 1)


@pytest.fixture
def uncompiled(monkeypatch):
    """The parts as they are: for what does not depend on the compiler."""
    monkeypatch.setattr(engine, "_compile_parts", lambda kind: (kind.begin, kind.finish))


def test_every_length_runs_what_was_compiled_once_a_width(counter):
    model = small_model()
    prepared = Engine(model.family())
    for batch in BATCHES:
        tokens = tokens_of(*batch)
        raw = prepared(tokens, packing_of(tokens), 3)
        for level, backbone in model.family().items():
            with torch.no_grad():
                expected = backbone(tokens, packing_of(tokens))
            torch.testing.assert_close(raw[level], expected, atol=2e-5, rtol=0)
        assert counter.frame_count == 2 * len(SHAPES)


def test_only_the_levels_asked_for_run(counter):
    tokens = tokens_of("MKV")
    raw = Engine(small_model().family())(tokens, packing_of(tokens), 2)
    assert list(raw) == ["a", "b"]
    assert counter.frame_count == 4


@given(lengths=st.lists(st.integers(1, 3_000), min_size=1, max_size=40))
def test_a_fixed_shape_holds_its_batch_with_little_to_fill(lengths):
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    shape, tokens = shape_for(Packing.of(real)), sum(lengths)
    assert shape.tokens >= tokens
    assert shape.tokens - tokens <= max(tokens / 8, 256)
    assert shape.sequences > len(lengths)
    assert shape.longest >= max(*lengths, shape.tokens - tokens)


def test_few_shapes_serve_all_sizes():
    sizes = {
        shape_for(Packing.of(torch.ones(1, tokens, dtype=torch.bool))).tokens for tokens in range(1, 16_385)
    }
    assert len(sizes) <= 49
    assert max(sizes) == engine.GRAPH_TOKENS


def reference_varlen(q, k, v, edges, longest):
    """Attention between edges; sequences may be empty."""
    parts = [part.tensor_split(edges[1:-1].long().cpu()) for part in (q, k, v)]
    assert edges.diff().max() <= longest
    mixed = [
        torch.nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1) for part in here))
        for here in zip(*parts, strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in mixed])


def test_a_slot_gives_each_batch_its_own_results_whatever_was_in_it_before(monkeypatch):
    """What a graph would replay, run without one: filling never reaches the batch, nor does the last one."""
    monkeypatch.setattr(engine, "attend_varlen", reference_varlen)
    model = small_model()
    backbone = model.backbones["c"]
    prepared = Engine({"c": backbone})
    prepared._begin, prepared._finish = TransformerLayer.begin, TransformerLayer.finish
    slot = None
    for batch in [BATCHES[3], *BATCHES, BATCHES[0]]:
        tokens = tokens_of(*batch)
        packing = packing_of(tokens)
        inputs = Inputs(*token_dropout(tokens, packing, torch.float32), packing.positions, None)
        slot = slot or Slot(Shape(512, 16, 512), inputs, ALPHABET.padding_idx)
        slot.fill(inputs, packing.edge_tensor)
        with torch.no_grad():
            fixed = prepared._run(slot.inputs, 1)["c"]
            expected = backbone(tokens, packing)
        assert fixed.shape == (512, backbone.embed_dim)
        assert fixed.isfinite().all()
        torch.testing.assert_close(fixed[: len(expected)], expected, atol=2e-5, rtol=0)


def replace_a_parameter(backbone):
    backbone.layers[0].fc1.weight = torch.nn.Parameter(backbone.layers[0].fc1.weight.clone())


def replace_a_module(backbone):
    backbone.layers[1].self_attn.q_proj = torch.nn.Sequential(backbone.layers[1].self_attn.q_proj)


def assign_a_state_dict(backbone):
    backbone.load_state_dict(copy.deepcopy(backbone.state_dict()), assign=True)


def replace_the_angles(backbone):
    rotary = backbone.layers[0].self_attn.rot_emb
    rotary.inv_freq = rotary.inv_freq.clone()


@pytest.mark.parametrize(
    "change",
    [torch.nn.Module.half, replace_a_parameter, replace_a_module, replace_the_angles, assign_a_state_dict],
)
def test_a_prepared_chain_notices_when_its_parameters_go(uncompiled, change):
    model = small_model()
    prepared = Prepared(model.family())
    model.backbones["b"].layers[0].fc1.weight.data.mul_(2)  # in place: a graph reads the new values
    assert prepared.is_current
    change(model.backbones["b"])
    assert not prepared.is_current


def test_preparing_on_a_cpu_changes_nothing_but_the_mode():
    model, tokens = small_model(), tokens_of(*BATCHES[0])
    with torch.no_grad():
        expected = model(tokens).embeddings
        assert model.train().prepare_inference() is model
        assert not model.training
        assert torch.equal(model(tokens).embeddings, expected)
    assert model._prepared is None


@pytest.fixture
def on_engine(monkeypatch):
    """A prepared model on whatever device there is: a CPU answers as if the engine were for it too."""
    monkeypatch.setattr(hardware, "has_engine", lambda device: True)
    return lambda model: model.prepare_inference()


def test_a_prepared_model_gives_the_models_results(counter, on_engine):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    with torch.no_grad():
        expected = model(tokens)
        got = on_engine(model)(tokens)
    assert counter.frame_count == 2 * len(SHAPES)
    for part in ("embeddings", "logits"):
        torch.testing.assert_close(got[part], expected[part], atol=2e-5, rtol=0)


def test_a_prepared_model_keeps_prefixes_to_the_bit(uncompiled, on_engine):
    model, tokens = on_engine(small_model()), tokens_of(*BATCHES[2])
    with torch.no_grad():
        whole = model(tokens).embeddings
        for width in (*model.config.widths.values(), 7):
            assert torch.equal(model(tokens, width=width).embeddings, whole[..., :width])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 3)])
def test_a_prepared_model_takes_batches_without_tokens(uncompiled, on_engine, shape):
    with torch.no_grad():
        out = on_engine(small_model())(torch.full(shape, 1))
    assert out.embeddings.shape == (*shape, 64)
    assert not out.embeddings.any()


def test_gradients_training_and_attention_maps_take_the_modules_own_way(uncompiled, on_engine, monkeypatch):
    model, tokens = on_engine(small_model()), tokens_of(*BATCHES[0])
    monkeypatch.setattr(Engine, "__call__", lambda *_: pytest.fail("the engine ran"))
    model(tokens).embeddings.sum().backward()
    with torch.no_grad():
        model(tokens, need_head_weights=True)
        model.train()(tokens)


def test_a_prepared_model_can_be_copied_and_pickled(on_engine, uncompiled):
    model, tokens = on_engine(small_model()), tokens_of("MKV")
    with torch.no_grad():
        expected = model(tokens).embeddings
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied._prepared is None
            torch.testing.assert_close(copied(tokens).embeddings, expected, atol=2e-5, rtol=0)


def shift_features(parts):
    """An engine whose embeddings are another level's features."""
    return {level: hidden.roll(1, -1) for level, hidden in parts.items()}


def lose_a_token(parts):
    """One whose last packed token was never written."""
    return {level: torch.cat((hidden[:-1], torch.zeros_like(hidden[-1:]))) for level, hidden in parts.items()}


def keep_the_first(parts, kept):
    """One that always replays its first batch."""
    return {level: kept.setdefault(level, hidden) for level, hidden in parts.items()}


def turn_to_nan(parts):
    """One that overflows."""
    return {level: hidden * float("nan") for level, hidden in parts.items()}


def fail(error):
    """One that ends with an error."""

    def ended(*_, **__):
        raise error

    return ended


BROKEN = {
    "shifted": (shift_features, "at level a it is .* standard deviations from the reference"),
    "a token lost": (lose_a_token, "at level a it is .* with a smallest cosine of"),
    "replayed": (keep_the_first, "at level a it is .* standard deviations from the reference"),
    "NaN": (turn_to_nan, "at level a it is nan standard deviations"),
    "no compiler": (
        fail(RuntimeError("Failed to find C compiler.\nSet CC")),
        "it fails with RuntimeError: Failed to find C compiler.; ",
    ),
    "no Triton": (fail(ModuleNotFoundError("No module named 'triton'")), "ModuleNotFoundError: No module"),
    "no memory": (
        fail(torch.OutOfMemoryError("CUDA out of memory.")),
        "OutOfMemoryError: CUDA out of memory",
    ),
    "no words": (fail(AssertionError()), "because it fails with AssertionError; the model runs without it"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=[*BROKEN])
def test_a_broken_engine_is_left_out_with_one_warning_and_the_reference_runs(
    uncompiled, on_engine, monkeypatch, change, message, dtype
):
    model, tokens = small_model().to(dtype), tokens_of(*BATCHES[2])
    with torch.no_grad():
        expected = model(tokens).embeddings
    run = Engine._run
    change = partial(change, kept={}) if change is keep_the_first else change
    monkeypatch.setattr(Engine, "_run", lambda *call: change(run(*call)))
    with pytest.warns(UserWarning, match=message) as warned:
        on_engine(model)
    assert str(warned[0].message).startswith(
        "the fast path (prepare_inference) is not used on this device, because "
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(on_engine(model)(tokens).embeddings, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_an_engine_that_gives_the_references_numbers_is_taken(uncompiled, on_engine, monkeypatch, dtype):
    model, tokens, runs = on_engine(small_model().to(dtype)), tokens_of(*BATCHES[2]), []
    run = Engine._run
    monkeypatch.setattr(Engine, "_run", lambda *call: runs.append(1) or run(*call))
    with torch.no_grad():
        model(tokens)
    assert runs == [1]


def test_float32_may_be_off_by_as_much_as_tf32_where_somebody_allowed_it(uncompiled, on_engine, monkeypatch):
    run = Engine._run
    noise = {"a": 1 + 1e-3}
    monkeypatch.setattr(Engine, "_run", lambda *call: {k: v * noise.get(k, 1) for k, v in run(*call).items()})
    with pytest.warns(UserWarning, match="at level a it is 0.00"):
        on_engine(small_model())
    monkeypatch.setattr(hardware, "has_exact_float32", lambda device: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_engine(small_model())


def test_an_engine_that_fails_later_gives_way_to_the_reference(uncompiled, on_engine, monkeypatch):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    with torch.no_grad():
        expected = model(tokens).embeddings
        on_engine(model)
        monkeypatch.setattr(Engine, "_run", fail(RuntimeError("illegal access")))
        with pytest.warns(UserWarning, match="it fails with RuntimeError: illegal access") as warned:
            got = [model(tokens).embeddings for _ in range(3)]
    assert len(warned) == 1
    assert all(torch.equal(each, expected) for each in got)


def put_in_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def register_a_hook(model):
    model.backbones["b"].layers[1].register_forward_hook(lambda *_: None)


def register_a_pre_hook(model):
    model.backbones["a"].register_forward_pre_hook(lambda *_: None)


def replace_a_forward(model):
    """As accelerate's hooks do."""
    layer = model.backbones["c"].layers[0]
    layer.fc1.forward = layer.fc1.forward


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.backbones["a"].layers[0].fc2)


OBSTACLES = [
    (put_in_lora, r"a.layers.0.self_attn.q_proj is a peft\.\S+\.Linear, not one of the family's own modules"),
    (register_a_hook, "b.layers.1 has hooks"),
    (register_a_pre_hook, "because a has hooks"),
    (replace_a_forward, "c.layers.0.fc1 has hooks"),
    (parametrize, r"a.layers.0.fc2 is a \S+\.ParametrizedLinear, not one of the family's own modules"),
]


@pytest.mark.parametrize(("change", "message"), OBSTACLES)
def test_what_the_engine_would_pass_over_is_left_to_the_modules(uncompiled, on_engine, change, message):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    change(model)
    with torch.no_grad():
        expected = model.eval()(tokens).embeddings
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            embed(model, ["MKV", "MKVL"], tokens_per_batch=6)  # which had not been asked to prepare
        assert model._prepared is None
        with pytest.warns(UserWarning, match=message):
            on_engine(model)
        assert torch.equal(model(tokens).embeddings, expected)


@pytest.mark.parametrize(("change", "message"), OBSTACLES[:4])
def test_what_is_put_in_later_is_noticed(uncompiled, on_engine, change, message):
    model, tokens = on_engine(small_model()), tokens_of(*BATCHES[2])
    change(model)
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        got = model.eval()(tokens).embeddings
    model._prepared = None
    with torch.no_grad():
        assert torch.equal(model(tokens).embeddings, got)


def test_a_device_without_memory_for_the_engine_runs_the_reference(on_engine, monkeypatch):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    with torch.no_grad():
        expected = model(tokens).embeddings
    monkeypatch.setattr(preparing, "Engine", fail(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.warns(
        UserWarning, match="because it fails with OutOfMemoryError: CUDA out of memory.; the model"
    ):
        on_engine(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).embeddings, expected)


def test_memory_that_runs_out_later_is_said_so_that_batches_are_halved(uncompiled, on_engine, monkeypatch):
    model = on_engine(small_model())
    run = Engine._run

    def scarce(self, inputs, levels):
        if len(inputs.ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, inputs, levels)

    monkeypatch.setattr(Engine, "_run", scarce)
    sequences = ["MKVLA" * 5] * 8
    with pytest.warns(UserWarning, match="too many for the memory") as warned:
        vectors = embed(model, sequences, tokens_per_batch=200)
    assert {str(each.message)[:10] for each in warned} <= {
        "216 tokens",
        "189 tokens",
        "108 tokens",
        "81 tokens ",
    }
    assert np.ptp(vectors, axis=0).max() < 2e-5


def test_a_graph_that_memory_has_no_room_for_is_run_without_recording(uncompiled, monkeypatch):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    monkeypatch.setattr(Engine, "_records", True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    prepared = Engine(model.family())
    prepared._recordings["other"] = "a graph"

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Engine, "_record", no_room)
    raw = prepared(tokens, packing_of(tokens), 3)
    assert not prepared._recordings
    with torch.no_grad():
        for level, backbone in model.family().items():
            torch.testing.assert_close(raw[level], backbone(tokens, packing_of(tokens)), atol=2e-5, rtol=0)


def test_both_probes_have_the_same_shape_and_other_letters():
    lengths = [[len(sequence) for sequence in probe] for probe in PROBES]
    assert lengths[0] == lengths[1]
    assert len(set(lengths[0])) == len(lengths[0])
    assert all(one != other for one, other in zip(*PROBES, strict=True))


def test_the_limits_are_the_published_errors_of_half_precision():
    rows = [
        row
        for name in ("mini", "650M")
        for row in json.loads((RESULTS / f"half_precision_{name}.json").read_text())["rows"]
    ]
    for dtype in hardware.HALF:
        kind = f"{str(dtype).removeprefix('torch.')}, float32 residual"
        found = [row for row in rows if row["backbones"] == kind]
        assert LIMITS[dtype].error == max(row["error, mean"] for row in found)
        assert LIMITS[dtype].cosine == min(row["cosine, smallest"] for row in found)


@pytest.fixture
def prepared_models(monkeypatch):
    """The models that were prepared, on a CPU that answers as a GPU."""
    models = []
    monkeypatch.setattr(hardware, "has_engine", lambda device: True)

    def prepare(model):
        models.append(model)

    monkeypatch.setattr(RDModel, "prepare_inference", prepare)
    return models


def test_embedding_prepares_by_itself(prepared_models, tmp_path):
    model = small_model()
    embed(model, ["MKV", "MKVL"])
    assert prepared_models == []  # one batch is done sooner
    embed(model, ["MKV", "MKVL"], tokens_per_batch=6)
    assert prepared_models == [model]
    embed_to_store(model, [("one", "MKV")], tmp_path / "one.h5")
    assert prepared_models == [model, model]
    embed(model.train(), ["MKV", "MKVL"], tokens_per_batch=6)
    assert len(prepared_models) == 2  # the mode is its owner's
    with open_store(tmp_path / "one.h5") as store:
        assert list(store) == ["one"]


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_cuda_the_engine_passes_its_own_probe_and_embeds(dtype, tmp_path):
    model = small_cuda_model().to(dtype)
    sequences = [random_sequence(length, length) for length in range(1, 60)]
    expected = embed(model, sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_to_store(model, list(zip(map(str, range(59)), sequences, strict=True)), tmp_path / "out.h5")
    assert model._prepared is not None
    assert model._prepared._engine is not None
    with open_store(tmp_path / "out.h5") as store:
        within = 2e-5 if dtype == torch.float32 else 0.1
        np.testing.assert_allclose(store[:], expected, atol=within)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_cuda_graphs_streams_and_fusion_change_nothing_beyond_rounding(dtype):
    model = small_cuda_model().to(dtype)
    texts = [*BATCHES, *BATCHES[::-1], (random_sequence(17_000),)]
    batches = [*(tokens_of(*text).cuda() for text in texts), torch.full((2, 3), 1).cuda()]
    with torch.inference_mode():
        expected = [model(tokens).embeddings for tokens in batches]
        model.prepare_inference()
        for tokens, reference in zip(batches, expected, strict=True):
            got = model(tokens).embeddings
            real = tokens != model.padding_idx
            unit = 2e-5 if dtype == torch.float32 else 0.1
            assert ((got - reference)[real].abs() < unit * reference[real].std()).all()
            assert torch.equal(got, model(tokens).embeddings)  # a replay is a replay
            for width in model.config.widths.values():
                assert torch.equal(model(tokens, width=width).embeddings, got[..., :width])


@on_cuda
def test_on_cuda_new_weights_are_noticed():
    model, tokens = small_cuda_model().half().prepare_inference(), tokens_of("MKVLAA").cuda()
    with torch.inference_mode():
        model(tokens)
        for parameter in model.backbones.parameters():
            parameter.data = parameter.data * 1.1
        changed = model(tokens).embeddings
        model._prepared = None
        torch.testing.assert_close(changed, model(tokens).embeddings, atol=2e-2, rtol=2e-2)


def small_cuda_model():
    """Head sizes that `varlen_attn` takes."""
    from helpers import random_esm2, random_stages

    from rd_torch import RDModel

    shapes = {"a": (2, 64, 4), "b": (2, 96, 4), "c": (3, 128, 4)}
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    stages = random_stages(widths={name: shape[1] for name, shape in shapes.items()})
    return RDModel(backbones, stages).eval().cuda()
