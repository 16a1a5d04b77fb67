"""The authors' maps: their formula in float64 against the loaded chain, every name, broken files."""

import numpy as np
import pytest
import torch
from files import SMALL_LEVELS, perturbed_esm2, published_formula, save_published
from helpers import tokens_of

import rd_torch
from rd_torch.weights import read_checkpoint

TOKENS = tokens_of("MKTAYIAKQR<mask>QISFVK", "ACDEF")
REAL = TOKENS != 1
SPECIAL = REAL & ((TOKENS < 4) | (TOKENS > 28))


@pytest.fixture(scope="module")
def backbones():
    return {name: perturbed_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SMALL_LEVELS.items())}


@pytest.fixture(scope="module")
def raw(backbones):
    """fair-esm's own final embeddings, in float64."""
    with torch.no_grad():
        hidden = [
            module(TOKENS, repr_layers=[module.num_layers])["representations"][module.num_layers]
            for module in backbones.values()
        ]
    return [each.double().numpy() for each in hidden]


def load(folder, backbones, level="150M", **options):
    return rd_torch.RDModel.from_pretrained(folder, level=level, backbones=backbones, **options)


def largest_difference(got, expected, where=REAL):
    return float((got.double() - torch.from_numpy(expected))[where].abs().max())


@pytest.mark.parametrize("regressor", ["pcr", "linear", "ridge"])
@pytest.mark.filterwarnings("ignore:linear and ridge maps do not say")
def test_loaded_maps_equal_the_published_formula(backbones, raw, tmp_path, regressor):
    chain = save_published(tmp_path, regressor=regressor)
    out = load(tmp_path, backbones, regressor=regressor, special_rows="larger")(TOKENS)
    levels = published_formula(chain, raw)
    expected = levels[-1].copy()
    expected[SPECIAL] = raw[-1][SPECIAL]
    assert largest_difference(out.embeddings, expected) < 1e-4
    for name, level in zip(SMALL_LEVELS, levels[:-1], strict=False):
        assert largest_difference(out["representations"][name], level) < 1e-4
    maps = load(tmp_path, backbones, regressor=regressor)(TOKENS)
    assert largest_difference(maps.embeddings, levels[-1]) < 1e-4
    prefix = load(tmp_path, {name: backbones[name] for name in ("8M", "35M")}, "35M", regressor=regressor)
    assert torch.equal(prefix(TOKENS).embeddings, maps["representations"]["35M"])


@pytest.mark.filterwarnings("ignore:these maps look fitted on")
def test_maps_applied_to_the_previous_backbone_equal_that_formula(backbones, raw, tmp_path):
    chain = save_published(tmp_path, raw=True)
    out = load(tmp_path, backbones, predict_from="previous")(TOKENS)
    assert largest_difference(out.embeddings, published_formula(chain, raw, previous=True)[-1]) < 1e-4


@pytest.mark.parametrize("pca", ["incremental", "fbpca"])
def test_the_naive_baseline_equals_its_formula_and_has_levels_of_its_own(backbones, raw, tmp_path, pca):
    chain = save_published(tmp_path, method="naive", pca=pca)
    model = load(tmp_path, backbones, method="naive", pca=pca)
    out, levels = model(TOKENS), published_formula(chain, raw)
    assert largest_difference(out.embeddings, levels[-1]) < 1e-4
    for name, level in zip(SMALL_LEVELS, levels, strict=True):
        assert largest_difference(out["representations"][name], level) < 1e-4
    assert not torch.equal(out["representations"]["35M"], out.embeddings[..., :480])
    assert largest_difference(model(TOKENS, width=480).embeddings, levels[1]) < 1e-4
    assert largest_difference(model.encode(TOKENS, width=400), levels[1][..., :400]) < 1e-4
    assert list(model(TOKENS, width=400)["representations"]) == ["8M", 2]
    hidden = {name: torch.from_numpy(each).float() for name, each in zip(SMALL_LEVELS, raw, strict=True)}
    assert largest_difference(model.combine(hidden), levels[-1]) < 1e-4
    model.save_pretrained(tmp_path / "saved")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(TOKENS).embeddings, out.embeddings)
    assert again.config.method == "naive"
    assert torch.equal(model.truncate("35M")(TOKENS).embeddings, out["representations"]["35M"])


@pytest.mark.parametrize("sequences", ["0.5k", "1k", "5k", "10k"])
@pytest.mark.parametrize("pca", ["incremental", "fbpca"])
@pytest.mark.parametrize(
    ("method", "regressor"), [("rd", "pcr"), ("rd", "linear"), ("rd", "ridge"), ("naive", "pcr")]
)
@pytest.mark.filterwarnings("ignore:linear and ridge maps do not say")
def test_every_published_name_is_found(tmp_path, method, regressor, pca, sequences):
    (tmp_path / "weights").mkdir()
    kind = regressor if method == "rd" else "None"
    rows = {"rd": (160, 480), "naive": (480, 800)}[method]
    arrays = {"pca__mean_": np.ones(rows[1]), "pca__components_": np.full(rows, 0.5)}
    if method == "rd":
        arrays |= {"regressor__coef_": np.ones((480, 320)), "regressor__intercept_": np.ones(480)}
    if regressor == "pcr":
        arrays |= {"regressor__input_mean_": np.ones(320), "regressor__output_mean_": np.ones(480)}
        arrays |= {
            "regressor__input_components_": np.eye(320),
            "regressor__n_significant_pcs_": np.array(320),
        }
    np.savez(tmp_path / f"weights/{method}-scaler-8M-35M-{kind}-{pca}-{sequences}.npz", **arrays)
    options = {"method": method, "regressor": regressor, "pca": pca, "sequences": sequences}
    checkpoint = read_checkpoint(tmp_path, level="35M", **options)
    assert list(checkpoint.config.widths.values()) == [320, 480]
    assert checkpoint.config.method == method
    assert checkpoint.config.explained == (None,)
    assert checkpoint.config.levels[1].reference.repo == "facebook/esm2_t12_35M_UR50D"


def warned(recorded):
    return [str(each.message) for each in recorded if "fitted on" in str(each.message)]


def test_what_maps_were_fitted_on_is_said_once_and_only_when_it_matters(tmp_path, recwarn):
    save_published(tmp_path / "nested")
    save_published(tmp_path / "raw", raw=True)
    save_published(tmp_path / "ridge", regressor="ridge")
    read_checkpoint(tmp_path / "nested", level="150M")
    read_checkpoint(tmp_path / "raw", level="150M", predict_from="previous")
    read_checkpoint(tmp_path / "raw", level="35M")
    read_checkpoint(tmp_path / "ridge", level="35M", regressor="ridge")
    assert warned(recwarn) == []
    read_checkpoint(tmp_path / "raw", level="150M")
    read_checkpoint(tmp_path / "nested", level="150M", predict_from="previous")
    read_checkpoint(tmp_path / "ridge", level="150M", regressor="ridge")
    first, second, third = warned(recwarn)
    assert "fitted on the previous backbone's raw embedding" in first
    assert 'predict_from="previous" applies them as they were fitted' in first
    assert 'predict_from="nested" applies them as they were fitted' in second
    assert "linear and ridge maps do not say whether they were fitted on nested" in third


def test_what_is_explained_is_taken_over(tmp_path):
    save_published(tmp_path)
    explained = read_checkpoint(tmp_path, level="150M").config.explained
    assert [(each.r2, round(each.kept, 6)) for each in explained] == [(None, 0.9), (None, 0.9)]


def test_published_maps_become_a_checkpoint_of_ours(backbones, tmp_path):
    save_published(tmp_path)
    model = load(tmp_path, backbones)
    model.save_pretrained(tmp_path / "ours")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(again(TOKENS).embeddings, model(TOKENS).embeddings)


NAME = "weights/rd-scaler-35M-150M-pcr-incremental-1k.npz"


def change(folder, **changes):
    """The arrays of the second file with some replaced; None takes one away."""
    arrays = dict(np.load(folder / NAME)) | changes
    np.savez(folder / NAME, **{name: array for name, array in arrays.items() if array is not None})


def test_maps_that_do_not_fit_are_refused(tmp_path):
    chain = save_published(tmp_path)
    first = (tmp_path / NAME).with_name("rd-scaler-8M-35M-pcr-incremental-1k.npz")
    second = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"expected maps with .*'W': 480.* in .*35M-150M.*, got .*'W': 320"):
        read_checkpoint(tmp_path, level="150M")
    (tmp_path / NAME).write_bytes(second)
    change(tmp_path, pca__components_=chain[1]["pca__components_"][:, :-1])
    with pytest.raises(ValueError, match=r"expected maps with .*'V': 640.*, got .*'V': 639"):
        read_checkpoint(tmp_path, level="150M")
    (tmp_path / NAME).write_bytes(second)
    change(tmp_path, regressor__coef_=None)
    with pytest.raises(ValueError, match=r"expected pcr maps with .*regressor__coef_.* in .*35M-150M"):
        read_checkpoint(tmp_path, level="150M")
    (tmp_path / NAME).write_bytes(second)
    change(tmp_path, regressor__input_components_=np.ones((7, 480)))
    with pytest.raises(ValueError, match=r"expected an \.npz of numbers in .*35M-150M"):
        read_checkpoint(tmp_path, level="150M")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_maps_with_numbers_that_are_none_are_refused(tmp_path, bad):
    chain = save_published(tmp_path)
    change(tmp_path, pca__mean_=np.where(np.arange(640) == 5, bad, chain[1]["pca__mean_"]))
    with pytest.raises(
        ValueError, match=r"expected finite numbers in .*35M-150M.*, got NaN or infinity in m"
    ):
        read_checkpoint(tmp_path, level="150M")


class Runs:
    """A pickle of it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_in_an_npz_is_refused_and_nothing_runs(tmp_path):
    save_published(tmp_path)
    victim = tmp_path / "victim"
    change(tmp_path, regressor__coef_=np.array([Runs(str(victim))], dtype=object))
    with pytest.raises(ValueError, match=r"that would run code if it were trusted; nothing of it was run"):
        read_checkpoint(tmp_path, level="150M")
    assert not victim.exists()


@pytest.mark.parametrize("cut", [0, 500, -2000])
def test_truncated_maps_are_refused(tmp_path, cut):
    save_published(tmp_path)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"expected an \.npz of numbers in .*35M-150M"):
        read_checkpoint(tmp_path, level="150M")


def test_unknown_options_levels_and_files_are_named(tmp_path):
    save_published(tmp_path)
    with pytest.raises(
        ValueError, match="level of the authors' maps to be one of '8M', '35M', .*'15B', got None"
    ):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="regressor to be one of 'pcr', 'linear', 'ridge', got 'ols'"):
        read_checkpoint(tmp_path, level="35M", regressor="ols")
    with pytest.raises(ValueError, match="sequences to be one of '0.5k', '1k', '5k', '10k', got '2k'"):
        read_checkpoint(tmp_path, level="35M", sequences="2k")
    with pytest.raises(ValueError, match="expected special_rows to be one of"):
        read_checkpoint(tmp_path, level="35M", special_rows="raw")
    with pytest.raises(ValueError, match="expected options among method, regressor, .*, got 'kind'"):
        read_checkpoint(tmp_path, level="35M", kind="rd")
    with pytest.raises(
        FileNotFoundError, match=r"expected a checkpoint file .*150M-650M-pcr-incremental-1k\.npz"
    ):
        read_checkpoint(tmp_path, level="650M")
    with pytest.raises(
        ValueError,
        match="expected options of the authors' maps .pca. with those maps alone, got esm2-rd-mini",
    ):
        read_checkpoint("esm2-rd-mini", pca="fbpca")
