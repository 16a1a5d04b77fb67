"""`change_basis`: the chain that was solved, in other coordinates, and nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import SHAPES, WIDTHS, random_esm2, random_sequence
from test_solve import draw, moments_of, nest, solve

import rd_torch
from rd_torch import Basis, Nesting, RDConfig, RDModel, Stage, change_basis, solve_stages
from rd_torch.basis import solve_chain
from rd_torch.cli import main
from rd_torch.modules import modules_of
from rd_torch.stage import nest as run_stages

RAW = {"a": 4, "b": 7, "c": 9}
SIZES = list(RAW.values())
BASES = [
    {"scale": "feature"},
    {"scale": "block"},
    {"centre": True},
    {"rotate_first": True},
    {"scale": "feature", "rotate_first": True},
    {"scale": "block", "centre": True, "rotate_first": True},
]


def by_formula(raws, scale="none", centre=False, rotate_first=False, predict_from="nested", **options):
    """The unscaled chain over all rows; subtract, rotate, scale."""
    nested = nest(solve(raws, predict_from=predict_from, **options), raws, predict_from)
    first, rest = np.split(nested, [raws[0].shape[1]], axis=1)
    if centre:
        first = first - first.mean(0)
    if rotate_first:
        _, _, rows = np.linalg.svd(first - first.mean(0), full_matrices=False)
        peaks = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
        first = first @ (rows * np.sign(peaks)[:, None]).T
    blocks = [first]
    for before, raw in zip(solve_widths(raws, **options), solve_widths(raws, **options)[1:], strict=False):
        blocks.append(nested[:, before:raw])
    assert sum(block.shape[1] for block in blocks) == rest.shape[1] + first.shape[1]
    if scale == "feature":
        blocks = [block / block.std(0, ddof=1) for block in blocks]
    if scale == "block":
        blocks = [block / np.sqrt(block.var(0, ddof=1).mean()) for block in blocks]
    return np.hstack(blocks)


def solve_widths(raws, added=None, **_):
    sizes = [raw.shape[1] for raw in raws]
    return sizes if added is None else [sum(sizes[: k + 1]) for k in range(len(sizes))]


def run(stages, raws, predict_from="nested", names=("a", "b", "c")):
    """The stages by `rd_torch.stage.nest`, as a model runs them."""
    keys = names if isinstance(stages[0], Basis) else names[1:]
    raw = dict(zip(names, map(torch.from_numpy, raws), strict=False))
    return run_stages(raw, modules_of(dict(zip(keys, stages, strict=True))), predict_from)[names[-1]].numpy()


@pytest.mark.parametrize("options", BASES, ids=str)
@pytest.mark.parametrize("predict_from", ["nested", "previous"])
@pytest.mark.parametrize("regressor", ["pcr", "ridge"])
@pytest.mark.parametrize("added", [None, "all"])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_basis_is_a_change_of_coordinates_after_the_solve(options, predict_from, regressor, added, shift):
    raws = draw(shift=shift)
    chosen = {"predict_from": predict_from, "regressor": regressor, "added": added}
    got = run(solve_chain(moments_of(raws), SIZES, **chosen, **options), raws, predict_from)
    expected = by_formula(raws, **chosen, **options)
    assert np.abs(got - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("options", BASES, ids=str)
def test_what_the_stages_explain_stays_what_it_was(options):
    moments = moments_of(draw())
    plain = solve_stages(moments, SIZES)
    _, *stages = change_basis(plain, moments, SIZES, **options)
    assert [stage.explained for stage in stages] == [stage.explained for stage in plain]
    for stage, before in zip(stages, plain, strict=True):  # the same directions, of other lengths
        unit = stage.V / stage.V.norm(dim=0)
        assert torch.allclose(unit, before.V, atol=1e-12)


def test_without_options_the_stages_come_back_as_they_are():
    moments = moments_of(draw())
    stages = solve_stages(moments, SIZES)
    assert all(a is b for a, b in zip(change_basis(stages, moments, SIZES), stages, strict=True))
    assert all(type(stage) is Stage for stage in solve_chain(moments, SIZES))


def test_features_have_unit_variance_and_blocks_unit_mean_variance():
    raws = draw()
    for scale in ("feature", "block"):
        nested = run(solve_chain(moments_of(raws), RAW, scale=scale), raws)
        variances = nested.var(0, ddof=1)
        blocks = np.split(variances, [4, 7])
        assert np.allclose([block.mean() for block in blocks], 1)
        assert np.allclose(variances, 1) == (scale == "feature")


def test_rotated_first_features_are_the_best_of_their_number_and_can_be_turned_back():
    raws = draw()
    basis, *_ = solve_chain(moments_of(raws), RAW, rotate_first=True)
    turned = basis(torch.from_numpy(raws[0])).numpy()
    covariance = np.cov(turned.T)
    assert np.allclose(covariance, np.diag(covariance.diagonal()), atol=1e-10)
    assert np.all(np.diff(covariance.diagonal()) <= 1e-12)
    values = np.linalg.eigvalsh(np.cov(raws[0].T))[::-1]
    assert np.allclose(covariance.diagonal(), values)
    back = turned @ np.linalg.inv(basis.matrix.numpy()) + basis.mean.numpy()
    assert np.allclose(back, raws[0])
    assert not basis.mean.any()  # a rotation alone leaves the mean


def degenerate(rank_of_last, constant=False, seed=0):
    """Embeddings whose last one, and of whose first one a column, are of lower rank."""
    first, second, _ = draw(seed=seed)
    rng = np.random.default_rng(seed)
    first[:, 3] = 5.0 if constant else first[:, :3].sum(1)
    last = np.hstack((first, second))[:, :rank_of_last] @ rng.normal(size=(rank_of_last, 9))
    return [first, second, last]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("scale", ["feature", "block"])
@pytest.mark.parametrize("rotate_first", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_directions_without_variance_are_not_blown_up(constant, scale, rotate_first, rank):
    raws = degenerate(rank, constant)
    options = {"scale": scale, "rotate_first": rotate_first}
    stages = solve_chain(moments_of(raws), RAW, regressor="ols", added="all", **options)
    assert all(part.isfinite().all() for stage in stages for part in stage.buffers())
    exact = run(stages, raws)
    assert np.isfinite(exact).all()
    single = run([stage.float() for stage in stages], [raw.astype(np.float32) for raw in raws])
    spread = exact - exact.mean(0)
    assert np.abs(single - exact).max() < 1e-2 * np.abs(spread).max()  # rounding stays rounding
    assert exact.std(0).max() < 5


@pytest.mark.parametrize("options", BASES, ids=str)
def test_prefixes_stay_prefixes_to_the_bit_and_sub_chains_are_solved_alike(options):
    raws = [raw.astype(np.float32) for raw in draw()]
    moments = moments_of(draw())
    stages = [stage.float() for stage in solve_chain(moments, RAW, **options)]
    whole = run(stages, raws)
    assert np.array_equal(run(stages[:2], raws[:2], names=("a", "b")), whole[:, :7])
    assert np.array_equal(run(stages[:1], raws[:1], names=("a",)), whole[:, :4])
    short = [stage.float() for stage in solve_chain(moments, RAW, levels=["a", "b"], **options)]
    assert np.allclose(run(short, raws[:2], names=("a", "b")), whole[:, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "all"}, "expected scale to be one of 'none', 'feature', 'block', got 'all'"),
        ({"centre": 1}, "expected centre to be True or False, got 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        solve_chain(moments_of(draw()), RAW, **options)
    with pytest.raises(ValueError, match=message):
        rd_torch.fit({"a": random_esm2(1, 16, 4)}, iter(()), **options)


def test_a_basis_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected mean \(p,\) and matrix \(p, p\), got \(3,\), \(3, 2\)"):
        Basis(torch.zeros(3), torch.zeros(3, 2), centre=True)
    with pytest.raises(ValueError, match="got one that changes nothing"):
        Basis(torch.zeros(3), torch.eye(3))
    basis = Basis(torch.zeros(3), torch.eye(3), centre=True)
    with pytest.raises(ValueError, match="expected width 3, got 4"):
        basis(torch.zeros(1, 4))
    backbones = {name: random_esm2(*shape) for name, shape in SHAPES.items()}
    other = solve_chain(moments_of(draw(list(WIDTHS.values()))), WIDTHS, centre=True)
    with pytest.raises(ValueError, match="expected tensors of shapes"):
        RDModel(backbones, [basis, *other[1:]])
    with pytest.raises(ValueError, match='expected special_rows="maps" where features are scaled'):
        RDModel(backbones, other, special_rows="larger")


def test_the_baseline_has_no_basis():
    config = RDModel.from_pretrained("esm2-rd-mini").config
    with pytest.raises(ValueError, match="expected the baseline as it is, got it scaled, centred or rotated"):
        replace(config, method="naive", scale="feature")


# Chains with a basis, whole


PROTEINS = [random_sequence(length, seed=length) for length in (30, 41, 55, 38, 47, 60, 33, 29)]


def fitted(**options):
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    return rd_torch.fit(backbones, PROTEINS, **options)


@pytest.fixture(scope="module", params=BASES[-2:], ids=str)
def options(request):
    return request.param


@pytest.fixture(scope="module")
def chain(options):
    return fitted(**options)


def test_a_fitted_chain_is_saved_cut_and_told_from_others(chain, options, tokens, tmp_path):
    expected = {"scale": "none", "centre": False, "rotate_first": False} | options
    assert chain.config.basis == expected
    assert isinstance(chain.stages["a"], Basis)
    out = chain(tokens).embeddings
    chain.save_pretrained(tmp_path / "chain")
    assert json.loads((tmp_path / "chain" / "config.json").read_text())["scale"] == options["scale"]
    again = RDModel.from_pretrained(tmp_path / "chain")
    assert torch.equal(again(tokens).embeddings, out)
    assert again.fingerprint() == chain.fingerprint() != fitted().fingerprint()
    assert again.config.basis == expected
    for level, width in chain.config.widths.items():
        short = RDModel.from_pretrained(tmp_path / "chain", level=level)
        cut = chain.truncate(level)
        assert short.fingerprint() == cut.fingerprint()
        assert torch.equal(short(tokens).embeddings, out[..., :width])
        assert torch.equal(cut(tokens).embeddings, out[..., :width])
        assert torch.equal(chain(tokens, width=width).embeddings, out[..., :width])
    nesting = Nesting.from_pretrained(tmp_path / "chain")
    raw = {name: torch.randn(7, width) for name, width in WIDTHS.items()}
    assert torch.equal(nesting.combine(raw), chain.combine(raw))
    assert torch.equal(nesting.until("b").combine({k: raw[k] for k in "ab"}), chain.combine(raw)[:, :48])
    card = (tmp_path / "chain" / "README.md").read_text()
    assert "new coordinates" in card


def test_half_precision_and_double_leave_the_basis_exact(chain, tokens):
    import copy

    half = copy.deepcopy(chain).half()
    assert half.stages["a"].matrix.dtype == torch.float32
    assert half(tokens).embeddings.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        raw = torch.randn(3, 32)
        assert torch.equal(chain.stages["a"](raw), chain.stages["a"](raw.clone()))
        assert chain.stages["a"](raw).dtype == torch.float32
    assert copy.deepcopy(chain).double().stages["a"].matrix.dtype == torch.float64


def test_transformers_saves_and_loads_a_chain_with_a_basis(chain, tokens, tmp_path):
    encoder = rd_torch.TransformersEncoder(chain)
    expected = encoder(input_ids=tokens).last_hidden_state
    encoder.save_pretrained(tmp_path / "encoder")
    again = rd_torch.TransformersEncoder.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again(input_ids=tokens).last_hidden_state, expected)


def test_stores_are_fitted_and_combined_with_a_basis(options, tmp_path):
    plain = fitted()
    inputs = {}
    for level, backbone in plain.backbones.items():
        alone = RDModel({level: backbone}, [])
        inputs[level] = tmp_path / f"{level}.h5"
        rd_torch.embed_to_store(alone, list(enumerate(PROTEINS)), inputs[level], pool="none")
    nesting = rd_torch.fit_stores(inputs, **options)
    nesting.save_pretrained(tmp_path / "maps")
    nesting = Nesting.from_pretrained(tmp_path / "maps")
    rd_torch.combine_stores(nesting, inputs, tmp_path / "nested.h5")
    expected = rd_torch.embed(fitted(**options), PROTEINS, pool="none")
    with rd_torch.open_store(tmp_path / "nested.h5") as store:
        for row, wanted in zip(store.read(slice(None)), expected, strict=True):
            assert np.abs(np.asarray(row) - wanted).max() < 1e-3 * wanted.std()


def test_the_command_line_fits_tells_and_refuses(tmp_path):
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{k}\n{sequence}\n" for k, sequence in enumerate(PROTEINS)))
    command = ["fit", str(fasta), "--levels", "28K,90K", "--regressor", "ols"]
    basis = ["--scale", "block", "--centre", "--rotate-first"]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "chain"), *basis])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "chain")]).stdout
    for line in ("scale         block", "centre        true", "rotate_first  true"):
        assert line in shown.splitlines()
    assert "in new coordinates, and not its own to the bit" in " ".join(shown.split())
    model = RDModel.from_pretrained("esm2-rd-mini", level="90K")
    expected = rd_torch.fit(
        model.backbones, PROTEINS, regressor="ols", scale="block", centre=True, rotate_first=True
    )
    assert RDModel.from_pretrained(tmp_path / "chain").fingerprint() == expected.fingerprint()
    plain = CliRunner().invoke(main, ["info"]).stdout
    assert "scale" not in plain
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "other"), "--scale", "all"])
    assert result.exit_code == 2
    assert "'all' is not one of 'none', 'feature', 'block'" in result.stderr


def test_configs_of_earlier_versions_are_read_and_written_as_they_were():
    config = RDModel.from_pretrained("esm2-rd-mini").config
    values = config.to_dict()
    assert not {"scale", "centre", "rotate_first"} & set(values)
    assert RDConfig.from_dict(values) == config
    assert not config.has_basis


def test_the_fingerprint_of_a_chain_without_a_basis_is_what_it_was():
    assert RDModel.from_pretrained("esm2-rd-mini").fingerprint() == "94d112c18db0ed4ebd4d7299f8a78de4"
    assert Nesting.from_pretrained("esm2-rd-mini").fingerprint() == "ee21074dd98465d030e90cb9be5d5c37"


def test_layers_are_chosen_as_without_a_basis_and_levels_of_layers_have_one(tokens, tmp_path):
    options = {"layers": "all", "choose_layers": "added", "regressor": "ols"}
    plain = fitted(**options)
    model = fitted(**options, scale="feature", rotate_first=True)
    assert list(model.config.widths) == list(plain.config.widths)
    assert any("@" in level for level in model.config.widths)
    model.save_pretrained(tmp_path)
    again = RDModel.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).embeddings, model(tokens).embeddings)
    rows = np.concatenate(rd_torch.embed(model, PROTEINS, pool="none"))
    deviations = rows.std(0, ddof=1)  # a LayerNorm leaves a direction without variance
    assert np.sum(np.abs(deviations - 1) < 1e-3) >= 63
    assert np.all((np.abs(deviations - 1) < 1e-3) | (deviations < 1e-3))
    nested = torch.from_numpy(rows)
    for level, width in model.config.widths.items():
        shares = [again.reconstruct(nested[:, :k], level).r2 for k in (10, width, 64)]
        assert shares == sorted(shares)
        assert shares[-1] > 0.8
