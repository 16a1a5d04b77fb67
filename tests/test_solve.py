"""`solve_stages`: equal to the direct route over all rows, and the best a linear step can add."""

import math
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import SHAPES, random_esm2, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rd_torch import RDModel, RunningMoments, concat_pca, solve_stages
from rd_torch.significance import significant_components

WIDTHS = {"a": 4, "b": 7, "c": 9}
REGRESSORS = ("pcr", "ols", "ridge")
SIZES = list(WIDTHS.values())


class Step(NamedTuple):
    """One stage as numpy arrays, and its report."""

    W: np.ndarray
    b: np.ndarray
    m: np.ndarray
    V: np.ndarray
    r2: float
    kept: float


def draw(widths=SIZES, rows=150, shift=0.0, seed=0):
    """Raw embeddings of one set of tokens: shared latents of falling strength, and noise."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(rows, 6)) * 3.0 / np.arange(1, 7)
    blocks = [latents @ rng.normal(size=(6, width)) + rng.normal(size=(rows, width)) for width in widths]
    return [shift * (1 + rng.random(block.shape[1])) + block for block in blocks]


def moments_of(raws):
    moments = RunningMoments(sum(raw.shape[1] for raw in raws))
    for batch in torch.from_numpy(np.hstack(raws)).split(37):
        moments.update(batch)
    return moments


def as_steps(stages):
    assert all(part.dtype == torch.float64 for stage in stages for part in stage.buffers())
    return [
        Step(*(part.numpy() for part in (stage.W, stage.b, stage.m, stage.V)), *astuple(stage.explained))
        for stage in stages
    ]


def solve(raws, **options):
    return as_steps(solve_stages(moments_of(raws), [raw.shape[1] for raw in raws], **options))


def nest(steps, raws, predict_from="nested"):
    nested = raws[0]
    for step, previous, y in zip(steps, raws, raws[1:], strict=False):
        x = nested if predict_from == "nested" else previous
        nested = np.hstack((nested, (y - (x @ step.W + step.b) - step.m) @ step.V))
    return nested


def johnstone(eigenvalues, rows):
    """Which of the rising eigenvalues to keep, by the words of the design."""
    p = len(eigenvalues)
    edge = (1 + math.sqrt(p / rows)) ** 2
    bulk = eigenvalues[eigenvalues / max(eigenvalues.mean(), 1e-300) < edge]
    kept = eigenvalues > np.median(bulk if len(bulk) else eigenvalues[: max(1, p // 4)]) * edge
    if kept.any():
        return kept
    enough = 1 + np.searchsorted(np.cumsum(eigenvalues[::-1]), 0.95 * eigenvalues.sum())
    return np.arange(p) >= p - enough


def regress(x, y, regressor, alpha):
    """W on centred rows."""
    if regressor == "ols":
        return np.linalg.lstsq(x, y, rcond=None)[0]
    if regressor == "ridge":
        return np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ y)
    _, values, components = np.linalg.svd(x, full_matrices=False)
    kept = components[::-1][johnstone(values[::-1] ** 2 / (len(x) - 1), len(x))].T
    return kept @ np.linalg.lstsq(x @ kept, y, rcond=None)[0]


def direct(raws, counts, regressor="ols", alpha=1.0, predict_from="nested"):
    """All steps of a chain from all rows: regress, subtract, decompose, append."""
    nested, steps = raws[0], []
    for previous, y, count in zip(raws, raws[1:], counts, strict=False):
        x = nested if predict_from == "nested" else previous
        W = regress(x - x.mean(0), y - y.mean(0), regressor, alpha)
        b = y.mean(0) - x.mean(0) @ W
        residual = y - (x @ W + b)
        m = residual.mean(0)
        _, values, rows = np.linalg.svd(residual - m)
        peaks = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
        V = (rows * np.sign(peaks)[:, None])[:count].T
        r2 = 1 - np.trace(np.cov(residual.T)) / np.trace(np.cov(y.T))
        steps.append(Step(W, b, m, V, r2, (values[:count] ** 2).sum() / (values**2).sum()))
        nested = np.hstack((nested, (residual - m) @ V))
    return steps


def assert_close(got, expected, tolerance=1e-6):
    """Within a relative tolerance of the largest entry."""
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=0)


@pytest.mark.parametrize("regressor", REGRESSORS)
@pytest.mark.parametrize("predict_from", ["nested", "previous"])
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize(
    ("sizes", "added", "counts"),
    [
        (SIZES, None, (3, 2)),
        (SIZES, 2, (2, 2)),
        (SIZES, [0, 5], (0, 5)),
        (SIZES, "all", (7, 9)),
        ((4, 4, 4), [1, 4], (1, 4)),
        ((6, 4, 5), 3, (3, 3)),
    ],
)
def test_stages_equal_the_direct_route_over_all_rows(regressor, predict_from, shift, sizes, added, counts):
    rows = draw(sizes, rows=300, shift=shift)
    raws, unseen = [raw[:150] for raw in rows], [raw[150:] for raw in rows]
    options = {"regressor": regressor, "alpha": 20.0, "predict_from": predict_from}
    steps, stages = direct(raws, counts, **options), solve(raws, added=added, **options)
    for places in (raws, unseen):
        z = nest(stages, places, predict_from)[:, sizes[0] :]
        assert_close(z, nest(steps, places, predict_from)[:, sizes[0] :])
    for stage, step in zip(stages, steps, strict=True):
        assert_close(stage.W, step.W)
        assert_close(stage.V, step.V)
        assert (stage.r2, stage.kept) == pytest.approx((step.r2, step.kept), rel=1e-6)


def test_regressors_and_sources_differ_on_these_rows_and_pcr_on_nested_is_the_default():
    options = [(regressor, "nested") for regressor in REGRESSORS] + [("pcr", "previous")]
    raws = draw()
    solved = [solve(raws, alpha=20.0, regressor=one, predict_from=other)[1].b for one, other in options]
    for k, b in enumerate(solved):
        assert all(np.abs(b - other).max() > 1e-4 for other in solved[:k])
    assert (solve(raws)[1].b == solved[0]).all()


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("levels", [("a", "c"), ("b", "c"), ("a", "b"), ("c",), ("a", "b", "c")])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("predict_from", ["nested", "previous"])
def test_a_sub_chain_is_the_chain_of_its_columns(shift, levels, named, predict_from):
    raws = draw(shift=shift)
    places = [list(WIDTHS).index(level) for level in levels]
    widths, chosen = (WIDTHS, levels) if named else (SIZES, places)
    stages = as_steps(solve_stages(moments_of(raws), widths, levels=chosen, predict_from=predict_from))
    alone = solve([raws[place] for place in places], predict_from=predict_from)
    assert len(stages) == len(alone) == len(levels) - 1
    for stage, other in zip(stages, alone, strict=True):
        for part, its in zip(stage, other, strict=True):
            np.testing.assert_allclose(part, its, rtol=0, atol=1e-8)


SPOILERS = ("duplicated", "constant", "all constant", "few rows", "two rows")


def spoilt(how, widths, seed):
    """Raw embeddings without full rank."""
    raws = draw(widths, rows={"few rows": 3, "two rows": 2}.get(how, 100), seed=seed)
    for raw in raws:
        if how == "duplicated":
            raw[:, 1] = raw[:, 0]
        elif how.endswith("constant"):
            raw[:, slice(None) if how.startswith("all") else 1] = 0.1
    return raws


@pytest.mark.parametrize("how", SPOILERS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_rank_deficient_inputs_give_the_minimum_norm_solution(how, shift):
    x, y = spoilt(how, (4, 7), seed=3)[0] + shift, draw((4, 7), rows=100)[1]
    y = y[: len(x)]
    stage = solve([x, y], regressor="ols", added="all")[0]
    centred = np.where(np.ptp(x, axis=0) > 0, x - x.mean(0), 0)
    W = np.linalg.pinv(centred, rcond=1e-9) @ (y - y.mean(0))
    assert np.abs(stage.W - W).max() <= 1e-6 * max(1.0, np.abs(W).max())
    prediction = y - (nest([stage], [x, y])[:, 4:] @ stage.V.T + stage.m)
    assert_close(prediction, y.mean(0) + centred @ W)


@pytest.mark.parametrize("how", SPOILERS)
@pytest.mark.parametrize("regressor", REGRESSORS)
@pytest.mark.parametrize("predict_from", ["nested", "previous"])
def test_rank_deficient_chains_are_finite_with_orthonormal_directions(how, regressor, predict_from):
    raws = spoilt(how, SIZES, seed=4)
    stages = solve(raws, regressor=regressor, predict_from=predict_from)
    for stage in stages:
        assert all(np.isfinite(part).all() for part in stage)
        np.testing.assert_allclose(stage.V.T @ stage.V, np.eye(stage.V.shape[1]), rtol=0, atol=1e-10)
    assert np.isfinite(nest(stages, raws, predict_from)).all()


def missed(x, y, z):
    """Mean squared error of the least-squares reconstruction of y from [x, z]; differentiable."""
    basis = torch.linalg.qr(torch.cat((torch.ones(len(x), 1, dtype=x.dtype), x, z), dim=1)).Q
    return (y - basis @ (basis.T @ y)).square().mean()


def stage_on(seed, k):
    """x, y, r and z of one OLS stage, as tensors."""
    x, y = draw(SIZES[:2], seed=seed)
    stage = solve([x, y], regressor="ols", added=k)[0]
    z = nest([stage], [x, y])[:, SIZES[0] :]
    return [torch.from_numpy(part) for part in (x, y, y - (x @ stage.W + stage.b), z)]


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_with_ols_the_prefix_and_the_added_block_are_uncorrelated_and_variances_fall(k, shift):
    raws = draw(shift=shift)
    nested = nest(solve(raws, regressor="ols", added=k), raws)
    correlation, variances = np.corrcoef(nested.T), nested.var(0)
    for start in (SIZES[0], SIZES[0] + k):
        assert np.abs(correlation[:start, start : start + k]).max() < 1e-6
        assert (np.diff(variances[start : start + k]) <= 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_no_random_block_of_the_same_size_reconstructs_the_larger_embedding_better(k):
    x, y, residual, z = stage_on(seed=5, k=k)
    best = missed(x, y, z)
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        A = torch.randn(y.shape[1], k, generator=generator, dtype=y.dtype)
        assert missed(x, y, (y if number % 2 else residual) @ A) > best * (1 + 1e-9)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("acts_on", ["y", "residual", "rows"])
def test_no_block_found_by_gradient_descent_reconstructs_the_larger_embedding_better(k, acts_on):
    x, y, residual, z = stage_on(seed=6, k=k)
    seen = {"y": y, "residual": residual, "rows": torch.eye(len(y), dtype=y.dtype)}[acts_on]
    A = torch.randn(seen.shape[1], k, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    optimizer = torch.optim.LBFGS([A.requires_grad_()], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        error = missed(x, y, seen @ A)
        error.backward()
        return error.detach()

    start, best = loss(), missed(x, y, z)
    optimizer.step(loss)
    assert best * (1 - 1e-9) <= loss() <= best * 1.01 < start  # the search was in earnest


@pytest.mark.parametrize("regressor", REGRESSORS)
@pytest.mark.parametrize("sizes", [SIZES, (5, 5, 5), (6, 3, 4)])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_all_added_directions_reconstruct_the_larger_embedding_exactly(regressor, sizes, shift):
    raws = draw(sizes, shift=shift)
    stages = solve(raws, regressor=regressor, added="all")
    for k, (stage, raw) in enumerate(zip(stages, raws[1:], strict=True), start=1):
        x, z = np.split(nest(stages[:k], raws), [sum(sizes[:k])], axis=1)
        assert_close(x @ stage.W + stage.b + z @ stage.V.T + stage.m, raw, 1e-8)
        assert stage.kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sizes", [(5, 4), (4, 6, 5), (8, 4, 9)])
def test_widths_that_do_not_grow_need_added_and_the_error_says_so(sizes):
    with pytest.raises(ValueError, match="where widths do not grow, say how many with `added`"):
        solve(draw(sizes))


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        (SIZES, {"regressor": "lasso"}, "expected regressor to be one of 'pcr', 'ols', 'ridge', got 'lasso'"),
        (SIZES, {"predict_from": "x"}, "expected predict_from to be one of 'nested', 'previous', got 'x'"),
        (SIZES, {"regressor": "ridge", "alpha": -1.0}, r"expected alpha of at least 0, got -1\.0"),
        (SIZES, {"regressor": "ridge", "alpha": math.nan}, "expected alpha of at least 0, got nan"),
        ((4, 7, 8), {}, r"expected moments of width 19, the sum of \[4, 7, 8\], got 20"),
        (WIDTHS, {"levels": ["a", "d"]}, r"expected levels among \['a', 'b', 'c'\], got \['a', 'd'\]"),
        (WIDTHS, {"levels": [0, 1]}, r"expected levels among \['a', 'b', 'c'\], got \[0, 1\]"),
        (SIZES, {"levels": [0, 3]}, r"expected levels among \[0, 1, 2\], got \[0, 3\]"),
        (WIDTHS, {"levels": []}, "expected levels among .*, got "),
        (WIDTHS, {"levels": ["b", "a"]}, "expected each level once in the order .*, got .'b', 'a'"),
        (WIDTHS, {"levels": ["a", "a"]}, "expected each level once in the order .*, got .'a', 'a'"),
        (SIZES, {"added": 8}, r"from 0 to the larger width \(\[7, 9\]\), got \[8, 8\]"),
        (SIZES, {"added": -1}, r"from 0 to the larger width \(\[7, 9\]\), got \[-1, -1\]"),
        (SIZES, {"added": [7, 10]}, r"from 0 to the larger width \(\[7, 9\]\), got \[7, 10\]"),
        (SIZES, {"added": [3]}, r"expected 2 whole numbers of added directions, .*, got \[3\]"),
        (SIZES, {"added": "most"}, "expected added to be one of 'all', got 'most'"),
    ],
)
def test_options_that_cannot_be_are_refused(widths, options, message):
    with pytest.raises(ValueError, match=message):
        solve_stages(moments_of(draw(rows=12)), widths, **options)


@pytest.mark.parametrize("rows", [0, 1])
def test_moments_of_too_few_rows_are_refused(rows):
    with pytest.raises(ValueError, match=f"expected at least 2 rows for a covariance, got {rows}"):
        solve([raw[:rows] for raw in draw()])


@pytest.mark.parametrize(
    ("eigenvalues", "rows", "kept"),
    [
        ([1.0, 1.1, 1.2, 9.0], 100, 1),  # edge 1.44, bulk median 1.1
        ([1.0, 1.0, 1.7, 1.7, 9.0], 100, 1),  # edge 1.50, bulk median 1.35: 1.7 is noise ...
        ([1.0, 1.0, 1.0, 1.7, 9.0], 100, 2),  # ... but not where it is 1.0
        ([1.0, 1.0, 1.0, 1.8, 9.0, 9.0, 9.0], 100, 4),  # the median of all, 1.8, would keep 3
        ([0.0, 0.0, 0.0, 1.0, 2.0], 100, 2),
        ([1.0] * 20, 10**40, 19),  # none below the edge, none above it: 95 % of the variance
        ([0.0] * 5, 100, 0),  # nothing to explain
        ([0.9] * 10 + [1.0] * 10, 50, 19),  # flat: 95 % of the variance
        ([0.01, 1.0, 1.0, 1.0], 30, 3),
    ],
)
def test_significant_components_of_known_spectra(eigenvalues, rows, kept):
    found = significant_components(torch.tensor(eigenvalues, dtype=torch.float64), rows)
    assert found.tolist() == [False] * (len(eigenvalues) - kept) + [True] * kept


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    values=st.lists(st.floats(1e-3, 10), min_size=1, max_size=12),
    lead=st.lists(st.floats(10, 1e3), max_size=3),
    rows=st.integers(2, 500),
)
def test_significant_components_follow_the_words_of_the_design(values, lead, rows):
    spectrum = np.sort(values + lead)
    found = significant_components(torch.from_numpy(spectrum), rows)
    assert found.tolist() == johnstone(spectrum, rows).tolist()
    assert found.any()


def test_widths_that_do_not_grow_want_to_be_told_how_many():
    moments = moments_of(draw((4, 4, 7)))
    with pytest.raises(ValueError, match=r"each from 1 to .*, got \[0, 3\]: where widths do not grow, say"):
        solve_stages(moments, [4, 4, 7])
    assert [stage.added for stage in solve_stages(moments, [4, 4, 7], added=np.array([2, 3]))] == [2, 3]


@pytest.mark.parametrize("added", [True, [1.5, 1.5], [2, True]])
def test_added_directions_are_whole_numbers(added):
    with pytest.raises(ValueError, match="expected 2 whole numbers of added directions"):
        solve_stages(moments_of(draw()), SIZES, added=added)


def test_a_source_of_tiny_scale_beside_a_larger_mean_still_predicts():
    x = 1e-10 * draw((4,))[0]
    y = x @ (1e10 * np.random.default_rng(0).normal(size=(4, 7))) + 1e4
    assert solve([x, y], regressor="ols")[0].r2 > 1 - 1e-6


def test_a_constant_larger_embedding_is_explained_wholly():
    x = draw((4,))[0]
    assert solve([x, np.full((len(x), 7), 1e4 + 0.1)], regressor="ols")[0].r2 == 1.0


def direct_components(raws):
    """Level by level: what the stages put out, from the singular vectors of all rows side by side."""
    outputs = raws[:1]
    for y in raws[1:]:
        both = np.hstack((outputs[-1], y))
        centred = both - both.mean(0)
        directions = np.linalg.svd(centred, full_matrices=False)[2]
        peaks = directions[np.arange(len(directions)), np.abs(directions).argmax(1)]
        outputs.append(centred @ (directions * np.sign(peaks)[:, None])[: y.shape[1]].T)
    return outputs


def components(raws, **options):
    return concat_pca(moments_of(raws), [raw.shape[1] for raw in raws], **options)


def concatenated(stages, raws):
    """What the stages put out, level by level."""
    outputs = [torch.from_numpy(raws[0])]
    for stage, y in zip(stages, raws[1:], strict=True):
        outputs.append(stage(outputs[-1], torch.from_numpy(y)))
    return [output.numpy() for output in outputs]


@pytest.mark.parametrize("sizes", [SIZES, (5, 5, 5), (6, 4, 5), (4,)])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_concatenated_components_equal_those_of_all_rows(sizes, shift):
    raws = draw(sizes, shift=shift)
    outputs, expected = concatenated(components(raws), raws), direct_components(raws)
    for output, its, size in zip(outputs, expected, sizes, strict=True):
        assert output.shape[1] == size
        assert_close(output, its)


def test_concatenated_components_are_centred_uncorrelated_and_fall_and_say_what_they_keep():
    raws = draw(shift=1e4)
    stages = components(raws)
    outputs = concatenated(stages, raws)
    for stage, before, y, output in zip(stages, outputs, raws[1:], outputs[1:], strict=False):
        assert all(part.dtype == torch.float64 for part in stage.buffers())
        assert np.abs(output.mean(0)).max() < 1e-6
        assert np.abs(np.corrcoef(output.T) - np.eye(output.shape[1])).max() < 1e-6
        assert (np.diff(output.var(0)) < 0).all()
        share = output.var(0).sum() / np.hstack((before, y)).var(0).sum()
        assert stage.explained.kept == pytest.approx(share)
        assert stage.explained.r2 is None


@pytest.mark.parametrize("levels", [("a", "c"), ("b", "c"), ("a", "b"), ("c",)])
def test_concatenated_components_of_a_sub_chain_are_those_of_its_columns(levels):
    raws = draw(shift=1e4)
    places = [list(WIDTHS).index(level) for level in levels]
    stages = concat_pca(moments_of(raws), WIDTHS, levels=levels)
    alone = components([raws[place] for place in places])
    assert len(stages) == len(alone) == len(levels) - 1
    for stage, other in zip(stages, alone, strict=True):
        torch.testing.assert_close(stage.mean, other.mean)
        torch.testing.assert_close(stage.components, other.components, rtol=0, atol=1e-8)


@pytest.mark.parametrize("how", SPOILERS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_concatenated_components_of_rank_deficient_inputs_are_finite_and_orthonormal(how, shift):
    raws = [raw + shift for raw in spoilt(how, SIZES, seed=4)]
    stages = components(raws)
    for stage in stages:
        V = stage.components.numpy()
        np.testing.assert_allclose(V.T @ V, np.eye(V.shape[1]), rtol=0, atol=1e-10)
        assert 0 <= stage.explained.kept <= 1 + 1e-12
    outputs, expected = concatenated(stages, raws), direct_components(raws)
    for output, its in zip(outputs, expected, strict=True):
        scale = max(1.0, np.abs(its).max() ** 2)
        difference = output @ output.T - its @ its.T  # directions without variance are free
        assert np.abs(difference).max() <= 1e-5 * scale


def test_a_model_takes_concatenated_components_as_its_stages():
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    widths = {name: width for name, (_, width, _) in SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    moments = RunningMoments(sum(widths.values()))
    moments.update(torch.randn(300, moments.width, dtype=torch.float64, generator=generator))
    stages = concat_pca(moments, widths)
    model = RDModel(backbones, stages).eval()
    assert model.config.method == "naive"
    assert model.config.widths == widths
    tokens = tokens_of("MKTAYIAKQR")
    out = model(tokens)
    raw = {
        name: module(tokens, repr_layers=[n])["representations"][n]
        for (name, module), n in zip(backbones.items(), (shape[0] for shape in SHAPES.values()), strict=True)
    }
    expected = raw["a"].double()
    for stage, name in zip(stages, ("b", "c"), strict=True):
        expected = stage(expected, raw[name])
    torch.testing.assert_close(out.embeddings[0, 1:-1].double(), expected[0, 1:-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ((4, 7, 8), {}, r"expected moments of width 19, the sum of \[4, 7, 8\], got 20"),
        (WIDTHS, {"levels": ["a", "d"]}, r"expected levels among \['a', 'b', 'c'\], got \['a', 'd'\]"),
        (WIDTHS, {"levels": ["b", "a"]}, "expected each level once in the order .*, got .'b', 'a'"),
    ],
)
def test_chains_that_cannot_be_concatenated_are_refused(widths, options, message):
    with pytest.raises(ValueError, match=message):
        concat_pca(moments_of(draw(rows=12)), widths, **options)


def test_moments_of_too_few_rows_have_no_components():
    with pytest.raises(ValueError, match="expected at least 2 rows for a covariance, got 1"):
        components([raw[:1] for raw in draw()])
