"""`RunningMoments`: exact however the rows are cut and merged, and no larger for more of them."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rd_torch import RunningMoments

SHIFTS = (0.0, 1e4)
TOLERANCE = 1e-12


def dyadic_rows(rows, width, seed=0):
    """About unit variance; exact in float32 too, and so is the sum with a shift of 1e4."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randint(-4, 5, (width, width), generator=generator).double() / 4
    drawn = torch.randint(-128, 129, (rows, width), generator=generator).double() / 128
    return drawn @ (torch.eye(width, dtype=torch.float64) + mixing)


def moments_of(*batches, width):
    moments = RunningMoments(width)
    for batch in batches:
        moments.update(batch)
    return moments


def merge_at_random(parts, rng):
    """One of the parts, into which all others were merged in some order along some tree."""
    parts = list(parts)
    while len(parts) > 1:
        into, other = rng.sample(range(len(parts)), 2)
        parts[into].merge(parts[other])
        parts.pop(other)
    return parts[0]


def assert_moments(moments, rows, shift=0.0):
    """The moments are those of `rows + shift`; the covariance does not know of the shift."""
    scale = max(1.0, float(rows.square().mean()))
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0) + shift, rtol=TOLERANCE, atol=TOLERANCE)
    expected = torch.atleast_2d(torch.cov(rows.T))
    torch.testing.assert_close(moments.covariance(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.mark.parametrize("shift", SHIFTS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1),
    width=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_any_cutting_and_any_order_of_merges_give_the_moments_of_all_rows(shift, sizes, width, seed):
    rows = dyadic_rows(sum(sizes), width, seed)
    batches = (rows + shift).split(sizes)
    assert_moments(moments_of(*batches, width=width), rows, shift)
    rng = random.Random(seed)
    parts = [moments_of(batch, width=width) for batch in batches]
    assert_moments(merge_at_random(parts, rng), rows, shift)
    streams = [moments_of(*batches[start::2], width=width) for start in (0, 1)]
    assert_moments(merge_at_random(streams, rng), rows, shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_many_small_batches_lose_no_digits(shift):
    rows = dyadic_rows(3_000, 3)
    assert_moments(moments_of(*(rows + shift).split(1), width=3), rows, shift)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_an_empty_batch_and_empty_moments_change_nothing(before):
    moments = moments_of(dyadic_rows(before, 3), width=3)
    mean, count = moments.mean, moments.count
    covariance = moments.covariance() if before > 1 else None
    moments.update(torch.empty(0, 3))
    moments.merge(RunningMoments(3))
    assert torch.equal(moments.mean, mean)
    assert moments.count == count
    if covariance is not None:
        assert torch.equal(moments.covariance(), covariance)


@pytest.mark.parametrize("before", [0, 4])
def test_merging_equals_updating(before):
    first, second = dyadic_rows(before, 4, seed=1), dyadic_rows(7, 4, seed=2)
    merged, other = moments_of(first, width=4), moments_of(second, width=4)
    merged.merge(other)
    updated = moments_of(first, second, width=4)
    assert torch.equal(merged.mean, updated.mean)
    assert torch.equal(merged.covariance(), updated.covariance())
    assert_moments(other, second)  # the other one is left as it was


def test_float32_rows_are_summed_in_float64():
    rows = dyadic_rows(500, 4)
    shifted = (rows + 1e3).float()
    assert torch.equal(shifted.double(), rows + 1e3)
    moments = moments_of(*shifted.split(17), width=4)
    assert moments.mean.dtype == moments.covariance().dtype == torch.float64
    assert_moments(moments, rows, 1e3)


def test_memory_does_not_grow_with_rows():
    def held(moments):
        return sum(
            part.untyped_storage().nbytes() for part in vars(moments).values() if torch.is_tensor(part)
        )

    moments = RunningMoments(5)
    empty = held(moments)
    assert empty <= 8 * (5 * 5 + 2 * 5)
    for rows in (1, 10, 1_000):
        moments.update(dyadic_rows(rows, 5))
        assert held(moments) == empty
        assert all(not isinstance(part, list | tuple | dict) for part in vars(moments).values())


def test_rows_that_require_gradients_are_detached():
    moments = moments_of(dyadic_rows(6, 3).requires_grad_(), width=3)
    moments.update(dyadic_rows(6, 3).requires_grad_())
    assert not moments.mean.requires_grad
    assert not moments.covariance().requires_grad


def test_results_are_copies():
    rows = dyadic_rows(6, 3)
    moments = moments_of(rows, width=3)
    moments.mean.zero_()
    moments.covariance().zero_()
    assert_moments(moments, rows)


@pytest.mark.parametrize("shape", [(4, 2), (4, 4), (3,), (2, 4, 3), (0, 4)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(rows, 3\), got \("):
        RunningMoments(3).update(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 2)])
def test_rows_that_are_not_finite_are_refused_and_leave_the_moments_alone(value, place):
    rows = dyadic_rows(5, 3)
    moments = moments_of(rows, width=3)
    spoilt = rows.clone()
    spoilt[place] = value
    with pytest.raises(ValueError, match="expected finite rows"):
        moments.update(spoilt)
    assert_moments(moments, rows)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_covariance_of_too_few_rows_is_refused(rows):
    with pytest.raises(ValueError, match=f"expected at least 2 rows for a covariance, got {rows}"):
        moments_of(dyadic_rows(rows, 3), width=3).covariance()


@pytest.mark.parametrize("width", [0, -1])
def test_a_width_below_one_is_refused(width):
    with pytest.raises(ValueError, match=f"expected a width of at least 1, got {width}"):
        RunningMoments(width)


def test_moments_of_another_width_are_not_merged():
    with pytest.raises(ValueError, match="expected moments of width 3, got 4"):
        RunningMoments(3).merge(RunningMoments(4))
