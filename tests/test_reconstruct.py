"""`reconstruct`: the best linear estimate of raw embeddings from any prefix, and the share it explains."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SHAPES, WIDTHS, random_esm2, random_sequence, random_stages, small_model
from safetensors.torch import load_file
from test_basis import BASES, RAW, SIZES, degenerate, fitted, run
from test_solve import draw, moments_of

import rd_torch
from rd_torch import Nesting, RDConfig, RDModel
from rd_torch.basis import solve_chain
from rd_torch.levels import Level
from rd_torch.modules import modules_of
from rd_torch.reconstruct import solve_reconstruction
from rd_torch.weights.folder import RECONSTRUCTION


def estimate_directly(nested, raw):
    """Least squares over all rows, with an intercept, and the share of the variance that it explains."""
    x, y = nested - nested.mean(0), raw - raw.mean(0)
    W = np.linalg.lstsq(x, y, rcond=1e-9)[0]
    missed = y - x @ W
    return raw - missed, 1 - missed.var(0).sum() / y.var(0).sum()


@pytest.mark.parametrize("options", [{}, *BASES], ids=str)
@pytest.mark.parametrize("predict_from", ["nested", "previous"])
@pytest.mark.parametrize("added", [None, "all"])
@pytest.mark.parametrize("regressor", ["pcr", "ridge"])
def test_the_estimate_is_that_of_least_squares_at_every_width(options, predict_from, added, regressor):
    raws = draw()
    chosen = {"predict_from": predict_from, "added": added, "regressor": regressor}
    stages = solve_chain(moments_of(raws), RAW, **chosen, **options)
    reconstructor = solve_reconstruction(stages, moments_of(raws), RAW, predict_from=predict_from)
    nested = run(stages, raws, predict_from)
    for level, raw in zip(RAW, raws, strict=True):
        for k in range(1, nested.shape[1] + 1):
            embedding, r2 = reconstructor.estimate(torch.from_numpy(nested[:, :k]), level)
            expected, share = estimate_directly(nested[:, :k], raw)
            assert np.abs(embedding.numpy() - expected).max() < 1e-5 * np.abs(raw).max()
            assert r2 == pytest.approx(share, abs=1e-6)


def test_all_directions_give_a_level_back():
    raws = [raw.astype(np.float32) for raw in draw()]
    moments = moments_of(draw())
    stages = solve_chain(moments, RAW, added="all")
    reconstructor = solve_reconstruction(stages, moments, RAW)
    nested = torch.from_numpy(run([stage.float() for stage in stages], raws))
    for level, raw, width in zip(RAW, raws, np.cumsum(SIZES), strict=True):
        for k in (width, nested.shape[1]):
            embedding, r2 = reconstructor.estimate(nested[:, :k], level)
            assert embedding.dtype == torch.float32
            assert np.abs(embedding.numpy() - raw).max() < 1e-5 * np.abs(raw).max()
            assert r2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": "feature", "rotate_first": True}], ids=str)
def test_features_that_depend_on_each_other_are_no_obstacle(rank, constant, options):
    raws = degenerate(rank, constant)
    moments = moments_of(raws)
    stages = solve_chain(moments, RAW, added="all", regressor="ols", **options)
    reconstructor = solve_reconstruction(stages, moments, RAW)
    exact = run(stages, raws)
    single = run([stage.float() for stage in stages], [raw.astype(np.float32) for raw in raws])
    for level, raw in zip(RAW, raws, strict=True):
        for k in (1, 3, 4, 6, 11, 20):
            embedding, r2 = reconstructor.estimate(torch.from_numpy(single[:, :k]).double(), level)
            expected, share = estimate_directly(exact[:, :k], raw)
            assert np.abs(embedding.numpy() - expected).max() < 1e-6 * np.abs(raw).max()
            assert r2 == pytest.approx(share, abs=1e-5)


def test_estimates_do_not_fall_as_features_are_added_and_take_any_shape():
    raws = draw(shift=1e3)
    moments = moments_of(raws)
    stages = solve_chain(moments, RAW)
    reconstructor = solve_reconstruction(stages, moments, RAW)
    for level, width in RAW.items():
        shares = [reconstructor.estimate(torch.zeros(k), level).r2 for k in range(1, 10)]
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] <= 1
        for shape in ((), (0,), (2, 3), (1, 1, 2)):
            embedding, _ = reconstructor.estimate(torch.zeros(*shape, 5), level)
            assert embedding.shape == (*shape, width)
    mean = torch.from_numpy(run(stages, raws)).mean(0)
    for level, raw in zip(RAW, raws, strict=True):
        assert np.allclose(reconstructor.estimate(mean, level).embedding, raw.mean(0), rtol=1e-5)


@pytest.fixture(scope="module")
def chain():
    return fitted(scale="feature")


def test_it_is_saved_mapped_cut_and_copied_with_the_chain(chain, tmp_path):
    nested = torch.randn(4, 64)
    expected = {level: chain.reconstruct(nested, level) for level in SHAPES}
    chain.save_pretrained(tmp_path / "chain")
    for other in (
        RDModel.from_pretrained(tmp_path / "chain"),
        Nesting.from_pretrained(tmp_path / "chain"),
        copy.deepcopy(chain),
        pickle.loads(pickle.dumps(Nesting.from_pretrained(tmp_path / "chain"))),
    ):
        for level, (embedding, r2) in expected.items():
            again = other.reconstruct(nested, level)
            assert torch.equal(again.embedding, embedding)
            assert again.r2 == pytest.approx(r2, abs=1e-12)
    short = chain.truncate("b")
    short.save_pretrained(tmp_path / "short")
    again = RDModel.from_pretrained(tmp_path / "short")
    for cut in (short, again, Nesting.from_pretrained(tmp_path / "chain").until("b")):
        assert torch.equal(
            cut.reconstruct(nested[:, :40], "a").embedding,
            chain.reconstruct(nested[:, :40], "a").embedding,
        )
        with pytest.raises(ValueError, match=r"expected a width from 1 to 48 \(levels: a 32, b 48\), got 64"):
            cut.reconstruct(nested, "a")
        with pytest.raises(ValueError, match="expected level to be one of 'a', 'b', got 'c'"):
            cut.reconstruct(nested[:, :40], "c")
    of_levels = {f"{level}.{name}" for level in "ab" for name in ("mean", "coefficients", "variance")}
    assert set(load_file(tmp_path / "short" / RECONSTRUCTION)) == {"mean", "factor", *of_levels}
    again.save_pretrained(tmp_path / "short")  # over the file that is mapped
    assert RDModel.from_pretrained(tmp_path / "short").reconstruct(nested[:, :40], "b").r2 is not None


def test_no_module_holds_it(chain):
    names = {name.rpartition(".")[2] for name, _ in (*chain.named_buffers(), *chain.named_parameters())}
    assert not {"factor", "coefficients"} & names
    assert not any("factor" in name for name in chain.state_dict())
    before = chain.reconstructor
    half = copy.deepcopy(chain).half()
    assert half.reconstructor is before
    assert half.reconstruct(torch.zeros(1, 10), "a").embedding.dtype == torch.float32


def test_a_folder_never_holds_what_another_chain_left(chain, tmp_path):
    chain.save_pretrained(tmp_path)
    chain.reconstruct(torch.zeros(1, 64), "c")
    held = RDModel.from_pretrained(tmp_path)
    expected = chain.reconstruct(torch.ones(1, 64), "c")
    small_model().save_pretrained(tmp_path)  # from parts
    assert not (tmp_path / RECONSTRUCTION).exists()
    assert torch.equal(held.reconstruct(torch.ones(1, 64), "c").embedding, expected.embedding)
    chain.truncate("b").save_pretrained(tmp_path / "b")
    (tmp_path / RECONSTRUCTION).write_bytes((tmp_path / "b" / RECONSTRUCTION).read_bytes())
    with pytest.raises(ValueError, match="expected tensors of shapes"):
        RDModel.from_pretrained(tmp_path)


def test_stores_that_are_fitted_give_raw_embeddings_back(tmp_path):
    plain, inputs = fitted(), {}
    proteins = [(str(k), random_sequence(30 + k, seed=k)) for k in range(8)]
    raw = {}
    for level, backbone in plain.backbones.items():
        alone = RDModel({level: backbone}, [])
        inputs[level] = tmp_path / f"{level}.h5"
        rd_torch.embed_to_store(alone, proteins, inputs[level], pool="none")
        with rd_torch.open_store(inputs[level]) as store:
            raw[level] = torch.cat([torch.as_tensor(np.asarray(row)) for row in store.read(slice(None))])
    nesting = rd_torch.fit_stores(inputs, added="all")
    nesting.save_pretrained(tmp_path / "maps")
    nesting = Nesting.from_pretrained(tmp_path / "maps")
    nested = nesting.combine(raw)
    for level, width in nesting.config.widths.items():
        embedding, r2 = nesting.reconstruct(nested[:, :width], level)
        assert (embedding - raw[level]).abs().max() < 1e-4 * raw[level].std()
        assert r2 == pytest.approx(1, abs=1e-6)


# Maps alone


def chain_of_maps(raws, **options):
    """A chain of parts, which holds maps alone, and the nested embedding of its rows."""
    stages = solve_chain(moments_of(raws), RAW, **options)
    names = list(RAW) if len(stages) == len(RAW) else list(RAW)[1:]
    by_level = dict(zip(names, stages, strict=True))
    levels = tuple(Level(name, None, width, None) for name, width in RAW.items())
    steps = stages[-2:]
    basis = stages[0].facts if len(stages) == len(RAW) else {}
    config = RDConfig(levels, tuple(stage.added for stage in steps), (None, None), **basis)
    return Nesting(config, modules_of(by_level)), torch.from_numpy(run(stages, raws))


@pytest.mark.parametrize("options", [{}, {"scale": "block", "centre": True}, {"rotate_first": True}], ids=str)
@pytest.mark.parametrize("added", [None, "all"])
def test_maps_alone_give_the_theorems_estimate(options, added):
    raws = draw()
    nesting, nested = chain_of_maps(raws, regressor="ols", added=added, **options)
    ends = list(nesting.config.widths.values())
    for place, (level, raw) in enumerate(zip(RAW, raws, strict=True)):
        for k in range(RAW["a"], ends[place] + 1):
            embedding, r2 = nesting.reconstruct(nested[:, :k], level)
            expected, _ = estimate_directly(nested[:, :k].numpy(), raw)
            assert r2 is None
            assert np.abs(embedding.numpy() - expected).max() < 1e-8 * np.abs(raw).max()
        wider, _ = nesting.reconstruct(nested, level)  # what lies beyond the level is not used
        assert torch.equal(wider, nesting.reconstruct(nested[:, : ends[place]], level).embedding)


def test_maps_alone_refuse_what_does_not_follow_from_them():
    nesting, nested = chain_of_maps(draw())
    with pytest.raises(
        ValueError, match="expected at least the 4 features of level a, because this chain holds"
    ):
        nesting.reconstruct(nested[:, :3], "b")
    previous = replace(nesting, config=replace(nesting.config, predict_from="previous"))
    with pytest.raises(ValueError, match="got maps that predict from previous raw embeddings alone"):
        previous.reconstruct(nested, "b")
    naive = replace(nesting, config=replace(nesting.config, method="naive"))
    with pytest.raises(ValueError, match="got maps of the baseline alone"):
        naive.reconstruct(nested, "b")


def test_a_chain_of_parts_reconstructs_by_its_maps():
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    model = RDModel(backbones, random_stages(regressor="ols", added="all"))
    raw = {name: torch.randn(5, width) for name, width in WIDTHS.items()}
    nested = model.combine(raw)
    for level, width in model.config.widths.items():
        embedding, r2 = model.reconstruct(nested[:, :width], level)
        assert r2 is None
        assert (embedding - raw[level]).abs().max() < 1e-4


def test_the_shipped_family_reconstructs():
    model = RDModel.from_pretrained("esm2-rd-mini")
    sequences = [random_sequence(80, seed=k) for k in range(4)]
    raw = {
        level: torch.cat(
            [
                torch.as_tensor(each)
                for each in rd_torch.embed(RDModel({level: backbone}, []), sequences, pool="none")
            ]
        )
        for level, backbone in model.backbones.items()
    }
    nested = model.combine(raw)
    shares = [model.reconstruct(nested[:, :k], "1M").r2 for k in (16, 32, 48, 64, 128)]
    assert shares == sorted(shares)
    assert shares[1] > 0.7
    assert shares[-1] > 0.97
    embedding, r2 = model.reconstruct(nested[:, :32], "28K")
    assert (embedding - raw["28K"]).abs().max() < 1e-5 * raw["28K"].std()
    assert r2 == pytest.approx(1, abs=1e-6)
    embedding, r2 = model.reconstruct(nested, "1M")
    missed = (embedding - raw["1M"]).var(0).sum() / raw["1M"].var(0).sum()
    assert 1 - missed == pytest.approx(r2, abs=0.02)


@pytest.mark.parametrize("how", [{"level": "28K@1"}, {"level": "28K", "layers": {"28K": 1}}], ids=str)
def test_another_layer_of_the_first_backbone_is_not_taken_for_the_one_that_was_fitted(how):
    model = RDModel.from_pretrained("esm2-rd-mini", **how)
    rows = torch.randn(3, 32)
    embedding, r2 = model.reconstruct(rows, "28K@1")
    assert torch.equal(embedding, rows)
    assert r2 is None
    with pytest.raises(ValueError, match="got a chain of maps alone, which knows no means"):
        rd_torch.similarity(rows, reference=model)


@pytest.mark.parametrize("how", [{"level": "a@1"}, {"level": "a", "layers": {"a": 1}}], ids=str)
def test_another_layer_has_no_basis(chain, tmp_path, how):
    chain.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="expected level a, whose features the chain scales, centres or rotates"
    ):
        RDModel.from_pretrained(tmp_path, **how)
