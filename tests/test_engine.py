"""The prepared engine: the modules' results, whatever the lengths, from parts compiled once a width."""

import copy
import pickle

import pytest
import torch
from helpers import SHAPES, random_sequence, small_model, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from rd_torch import engine
from rd_torch.engine import Engine, Inputs, Shape, Slot, shape_for
from rd_torch.esm2 import token_dropout
from rd_torch.packing import Packing

BATCHES = [
    ("MKV", random_sequence(40)),
    (random_sequence(60, 1),),
    ("M", "MK<mask>L", random_sequence(36, 2)),
    (random_sequence(200, 3), random_sequence(3, 4)),
]

on_cuda = pytest.mark.cuda


def packing_of(tokens):
    return Packing.of(tokens != 1)


@pytest.fixture
def counter(monkeypatch):
    """Counts compilations instead of generating code, and forgets them afterwards."""
    counts, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile_(part, backend=counts, **options))
    engine._fused.cache_clear()
    torch.compiler.reset()
    yield counts
    engine._fused.cache_clear()
    torch.compiler.reset()


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
    """Attention between boundaries; sequences may be empty."""
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
    prepared._heads, prepared._finish = type(backbone.layers[0]).heads, type(backbone.layers[0]).finish
    slot = None
    for batch in [BATCHES[3], *BATCHES, BATCHES[0]]:
        tokens = tokens_of(*batch)
        packing = packing_of(tokens)
        inputs = Inputs(*token_dropout(tokens, packing, torch.float32), packing.positions, None)
        slot = slot or Slot(Shape(512, 16, 512), inputs)
        slot.fill(inputs, packing.boundaries)
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
def test_an_engine_notices_when_its_parameters_go(change):
    model = small_model()
    prepared = Engine(model.family())
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


@pytest.fixture
def on_engine(monkeypatch):
    """A prepared model on whatever device there is: on a CPU the engine is put in by hand."""

    def prepare(model):
        model.eval()._engine = Engine(model.family())
        return model

    return prepare


def test_a_prepared_model_gives_the_models_results(counter, on_engine):
    model, tokens = small_model(), tokens_of(*BATCHES[2])
    with torch.no_grad():
        expected = model(tokens)
        got = on_engine(model)(tokens)
    assert counter.frame_count == 2 * len(SHAPES)
    for part in ("embeddings", "logits"):
        torch.testing.assert_close(got[part], expected[part], atol=2e-5, rtol=0)


def test_a_prepared_model_keeps_prefixes_to_the_bit(counter, on_engine):
    model, tokens = on_engine(small_model()), tokens_of(*BATCHES[2])
    with torch.no_grad():
        whole = model(tokens).embeddings
        for width in (*model.config.widths.values(), 7):
            assert torch.equal(model(tokens, width=width).embeddings, whole[..., :width])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 3)])
def test_a_prepared_model_takes_batches_without_tokens(counter, on_engine, shape):
    with torch.no_grad():
        out = on_engine(small_model())(torch.full(shape, 1))
    assert out.embeddings.shape == (*shape, 64)
    assert not out.embeddings.any()


def test_gradients_training_and_attention_maps_take_the_modules_own_way(counter, on_engine):
    model, tokens = on_engine(small_model()), tokens_of(*BATCHES[0])
    model(tokens).embeddings.sum().backward()
    with torch.no_grad():
        model(tokens, need_head_weights=True)
        model.train()(tokens)
    assert counter.frame_count == 0


def test_a_prepared_model_can_be_copied_and_pickled(on_engine, counter):
    model, tokens = on_engine(small_model()), tokens_of("MKV")
    with torch.no_grad():
        expected = model(tokens).embeddings
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied._engine is None
            torch.testing.assert_close(copied(tokens).embeddings, expected, atol=2e-5, rtol=0)


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
        model._engine = None
        torch.testing.assert_close(changed, model(tokens).embeddings, atol=2e-2, rtol=2e-2)


def small_cuda_model():
    """Head sizes that `varlen_attn` takes."""
    from helpers import random_esm2, random_stages

    from rd_torch import RDModel

    shapes = {"a": (2, 64, 4), "b": (2, 96, 4), "c": (3, 128, 4)}
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    stages = random_stages(widths={name: shape[1] for name, shape in shapes.items()})
    return RDModel(backbones, stages).eval().cuda()
