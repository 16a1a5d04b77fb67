"""`Stage`: the formula, the prefix to the bit, and maps that no half type touches."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rd_torch import Stage

MAPS = ("W", "b", "m", "V")
TO_HALF = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
}


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_stage(source=3, larger=5, added=2, dtype=torch.float64):
    """A stage whose numbers need all digits of their dtype, V orthonormal."""
    V = torch.linalg.qr(normal(larger, larger, seed=4)).Q[:, :added]
    parts = (normal(source, larger), normal(larger, seed=1), normal(larger, seed=2), V)
    return Stage(*(part.to(dtype) for part in parts))


def maps_of(stage):
    return {name: getattr(stage, name).clone() for name in MAPS}


def assert_same_bits(stage, maps):
    for name, part in maps.items():
        assert torch.equal(getattr(stage, name), part)
        assert getattr(stage, name).dtype == part.dtype


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    p=st.integers(1, 6),
    own_source=st.none() | st.integers(1, 6),
    q=st.integers(1, 7),
    share=st.floats(0, 1),
    batch=st.lists(st.integers(0, 3), max_size=3),
)
def test_a_stage_computes_its_formula_on_inputs_of_any_rank(p, own_source, q, share, batch):
    stage = make_stage(p if own_source is None else own_source, q, round(share * q))
    nested, larger = normal(*batch, p), normal(*batch, q, seed=9)
    source = None if own_source is None else normal(*batch, own_source, seed=8)
    out = stage(nested, larger) if source is None else stage(nested, larger, source)
    acted_on = nested if source is None else source
    prediction = torch.einsum("...p,pq->...q", acted_on, stage.W) + stage.b
    z = torch.einsum("...q,qk->...k", larger - prediction - stage.m, stage.V)
    assert out.shape == (*batch, p + stage.added)
    torch.testing.assert_close(out, torch.cat((nested, z), dim=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-30])
def test_the_first_features_are_the_nested_embedding_to_the_bit(dtype, scale):
    nested, larger = scale * normal(2, 7, 3, dtype=dtype), normal(2, 7, 5, dtype=dtype)
    out = make_stage(dtype=dtype)(nested, larger)
    assert out.dtype == dtype
    assert torch.equal(out[..., :3], nested)


def test_the_prediction_acts_on_the_source_and_only_the_added_features_know_of_it():
    stage, nested, larger = make_stage(source=4), normal(6, 3), normal(6, 5)
    one, other = (stage(nested, larger, normal(6, 4, seed=seed)) for seed in (1, 2))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.isclose(one[:, 3:], other[:, 3:]).any()


@pytest.mark.parametrize("with_source", [False, True])
def test_gradients_flow_to_every_input(with_source):
    widths = (3, 5, 4) if with_source else (3, 5)
    inputs = [normal(2, width, seed=width).requires_grad_() for width in widths]
    stage = make_stage(source=4 if with_source else 3)
    assert torch.autograd.gradcheck(stage, inputs)
    stage(*inputs).sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in inputs)


def test_maps_are_saved_buffers_without_gradient():
    stage = make_stage()
    assert not list(stage.parameters())
    assert {name for name, _ in stage.named_buffers()} == set(MAPS) == set(stage.state_dict())
    assert not any(part.requires_grad for part in stage.buffers())
    other = make_stage()
    for part in other.buffers():
        part.zero_()
    other.load_state_dict(stage.state_dict())
    assert_same_bits(other, maps_of(stage))


@pytest.mark.parametrize("convert", TO_HALF.values(), ids=TO_HALF)
@pytest.mark.parametrize("inside", [False, True])
def test_maps_never_pass_through_a_half_type(convert, inside):
    stage = make_stage(dtype=torch.float32)
    maps = maps_of(stage)
    module = nn.Sequential(nn.Linear(2, 2), stage) if inside else stage
    convert(module)
    assert_same_bits(stage, maps)
    assert_same_bits(stage.float(), maps)
    assert not inside or module[0].weight.dtype in (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("convert", TO_HALF.values(), ids=TO_HALF)
def test_double_maps_become_single_where_a_half_type_is_asked_for(convert):
    stage = make_stage()
    singles = maps_of(copy.deepcopy(stage).float())
    convert(stage)
    assert_same_bits(stage, singles)


def test_double_gives_float64():
    stage = make_stage(dtype=torch.float32)
    doubles = {name: part.double() for name, part in maps_of(stage).items()}
    assert_same_bits(stage.double(), doubles)
    assert stage(normal(4, 3), normal(4, 5)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("maps", [torch.float32, torch.float64])
def test_half_inputs_are_computed_in_the_maps_dtype(dtype, maps):
    stage = make_stage(dtype=maps)
    nested, larger = normal(4, 3, dtype=dtype), normal(4, 5, dtype=dtype)
    out = stage(nested, larger)
    assert out.dtype == maps
    assert torch.equal(out, stage(nested.to(maps), larger.to(maps)))
    assert torch.equal(stage(nested, larger.to(maps), nested), stage(nested, larger.to(maps)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    stage = make_stage(dtype=dtype)
    nested, larger = normal(4, 3, dtype=dtype), normal(4, 5, dtype=dtype)
    expected = stage(nested, larger)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (nested.float() @ nested.float().T).dtype == torch.bfloat16  # autocast is at work
        assert torch.equal(stage(nested, larger), expected)


def test_zero_added_directions_leave_the_nested_embedding():
    stage, nested = make_stage(added=0), normal(2, 4, 3)
    assert stage.added == 0
    assert torch.equal(stage(nested, normal(2, 4, 5)), nested)


@pytest.mark.parametrize(("wrong", "source"), [((4, 5), None), ((3, 4), None), ((3, 5), 5), ((3, 6), 3)])
def test_inputs_of_other_widths_are_refused(wrong, source):
    inputs = [normal(2, width) for width in (*wrong, *([source] if source else []))]
    got = f"{source or wrong[0]} and {wrong[1]}"
    with pytest.raises(ValueError, match=f"expected widths 3 and 5, got {got}"):
        make_stage()(*inputs)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (5,), (5,), (5, 2)),
        ((3, 5), (3,), (5,), (5, 2)),
        ((3, 5), (5,), (1, 5), (5, 2)),
        ((3, 5), (5,), (5,), (2, 5)),
        ((3, 5), (5,), (5,), (5,)),
    ],
)
def test_maps_that_do_not_fit_together_are_refused(shapes):
    with pytest.raises(
        ValueError, match=r"expected W \(source, q\), b \(q,\), m \(q,\), V \(q, added\), got"
    ):
        Stage(*(torch.zeros(shape) for shape in shapes))


def test_maps_are_frozen_whatever_tensors_they_came_from():
    W = torch.randn(3, 5, requires_grad=True)
    stage = Stage(W, torch.zeros(5), torch.zeros(5), torch.eye(5)[:, :2])
    assert not stage.W.requires_grad
    assert stage.W.data_ptr() == W.data_ptr()
    half = Stage(*(part.half() for part in (W, torch.zeros(5), torch.zeros(5), torch.eye(5))))
    assert half.W.dtype == torch.float32


def test_maps_of_several_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"expected one dtype, got W torch\.float32, b torch\.float64"):
        Stage(torch.zeros(3, 5), torch.zeros(5).double(), torch.zeros(5), torch.eye(5))
