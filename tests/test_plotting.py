import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_sequence
from matplotlib import image

import rd_torch
from rd_torch import embed_to_store, open_store, plot_store, sampling
from rd_torch.cli import main
from rd_torch.plotting import draw
from rd_torch.sampling import principal_components, read_sample
from rd_torch.sequences import Protein

PROTEINS = [Protein(f"P{i}", random_sequence(5 + 3 * i, seed=i)) for i in range(30)]
KINDS = [("h5", "mean"), ("h5", "none"), ("parquet", "mean"), ("pt", "mean"), ("pt", "none")]
SEQUENCES = [protein.sequence for protein in PROTEINS]


@pytest.fixture(scope="module")
def mini():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini")


@pytest.fixture(scope="module")
def stores(mini, tmp_path_factory):
    """The same proteins in a store of each kind; not to be changed."""
    folder = tmp_path_factory.mktemp("stores")
    paths = {kind: folder / f"{kind[1]}.{kind[0]}" for kind in KINDS}
    for (_, pool), path in paths.items():
        embed_to_store(mini, PROTEINS, path, pool=pool)
    return paths


def put(path, rows):
    with h5py.File(path, "w") as file:
        for number, row in enumerate(rows):
            file[f"P{number}"] = row
    return path


def sampled(path):
    with open_store(path) as store:
        return read_sample(store)


def drawn(path, width=None):
    """The figure and its axes: maps, norms, shares, cumulative shares; what colours mean where they do."""
    figure = draw(sampled(path), width)
    figure.draw_without_rendering()
    return figure, figure.axes


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_store_is_drawn_from_the_same_vectors(mini, stores, kind):
    sample = sampled(stores[kind])
    np.testing.assert_allclose(sample.vectors, rd_torch.embed(mini, SEQUENCES), atol=2e-5)
    assert sample.lengths == list(map(len, SEQUENCES))
    assert sample.levels == {"28K": 32, "90K": 48, "207K": 64, "1M": 128}
    assert sample.caption == ("vectors are averages over residues" if kind[1] == "none" else "")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_is_written_whole_in_the_format_of_its_name(stores, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    path.write_text("an older one")
    plot_store(stores["h5", "mean"], path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    assert list(tmp_path.iterdir()) == [path]
    if suffix == "png":
        picture = image.imread(path)
        assert picture.shape[:2] == (1680, 1600)
        assert 0.5 < (picture[..., :3] == 1).all(-1).mean() < 0.95


@pytest.mark.parametrize(
    ("width", "first"),
    [(None, "28K: the first 32 features"), (48, "90K: the first 48"), (40, "The first 40")],
)
def test_two_maps_show_the_narrow_and_the_whole_width(stores, width, first):
    _, (narrow, whole, *_) = drawn(stores["h5", "mean"], width)
    assert narrow.get_title("left").startswith(first)
    assert whole.get_title("left") == "1M: all 128 features"
    vectors = sampled(stores["h5", "mean"]).vectors
    for ax, features in ((narrow, width or 32), (whole, 128)):
        points, shares = principal_components(vectors[:, :features])
        np.testing.assert_allclose(np.abs(ax.collections[0].get_offsets()), np.abs(points))
        assert f"first principal component, {shares[0]:.0%} of variance" == ax.get_xlabel()
        assert f"second principal component, {shares[1]:.0%} of variance" == ax.get_ylabel()


def test_the_maps_lie_alike(stores):
    _, (narrow, whole, *_) = drawn(stores["h5", "mean"])
    points = [np.asarray(ax.collections[0].get_offsets()) for ax in (narrow, whole)]
    assert ((points[0] * points[1]).sum(0) > 0).all()


def test_the_whole_width_alone_is_one_map(stores):
    _, axes = drawn(stores["h5", "mean"], 128)
    assert [ax.get_title("left") for ax in axes if ax.get_title("left")] == [
        "1M: all 128 features",
        "Norm of each feature",
        "Explained variance of each feature",
    ]


@pytest.fixture
def without_lengths(stores, tmp_path):
    """A pooled store as earlier versions wrote it, whose datasets did not say their lengths."""
    path = Path(shutil.copy(stores["h5", "mean"], tmp_path))
    with h5py.File(path, "a") as file:
        for dataset in file.values():
            del dataset.attrs["length"], dataset.attrs["original_id"]
    return path


def test_colours_are_lengths_where_they_are_known(stores, without_lengths):
    _, axes = drawn(stores["parquet", "mean"])
    assert np.array_equal(axes[0].collections[0].get_array(), list(map(len, SEQUENCES)))
    assert axes[2].get_ylabel() == "residues"
    _, axes = drawn(without_lengths)
    assert axes[0].collections[0].get_array() is None
    assert "residues" not in [ax.get_ylabel() for ax in axes]


def test_norms_and_shares_stand_by_feature_with_the_levels_named(mini, without_lengths):
    _, axes = drawn(without_lengths)
    vectors = rd_torch.embed(mini, SEQUENCES).astype(np.float64)
    norms, shares, total = axes[2:]
    variances = vectors.var(0)
    for ax, values in ((norms, np.sqrt((vectors**2).mean(0))), (shares, variances / variances.sum())):
        points = np.concatenate([part.get_offsets() for part in ax.collections])
        np.testing.assert_array_equal(points[:, 0], np.arange(128) + 1)
        np.testing.assert_allclose(points[:, 1], values, rtol=1e-3)
        assert [text.get_text() for text in ax.texts] == ["28K", "90K", "207K", "1M"]
        assert [line.get_xdata()[0] for line in ax.lines] == [32.5, 48.5, 64.5]
        assert list(ax.get_xticks()) == [1, 32, 48, 64, 128]
    np.testing.assert_allclose(
        total.lines[0].get_ydata()[1:], variances.cumsum() / variances.sum(), rtol=1e-3
    )


WIDE = {"8M": 320, "35M": 480, "150M": 640, "650M": 1280, "3B": 2560, "15B": 5120}
CROWDED = {f"level{number}": end for number, end in enumerate((100, 104, 108, 112, 113, 200))}


@pytest.mark.parametrize("levels", [WIDE, CROWDED, {"1": 1}, {"a": 1, "b": 2}], ids=len)
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_no_words_overlap(tmp_path, levels, pool):
    width = max(levels.values())
    shape = (9, width) if pool == "none" else (width,)
    rows = np.random.default_rng(0).normal(size=(6, *shape)) * np.geomspace(10, 1e-3, width)
    sample = sampled(put(tmp_path / "a.h5", rows))
    figure = draw(replace(sample, levels=levels), None)
    figure.draw_without_rendering()
    texts = [figure._suptitle, figure._supxlabel]
    for ax in figure.axes:
        texts += [ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_visible() and text.get_text()
    ]
    assert len(boxes) > 20
    for number, (name, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0, name
        assert box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0, name
        assert box.y1 <= figure.bbox.y1, name
        for other, second in boxes[number + 1 :]:
            assert not box.overlaps(second), (name, other)


def test_of_many_records_an_evenly_spread_sample_is_drawn_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MOST_RECORDS", 7)
    monkeypatch.setattr(sampling, "RECORDS_READ", 2)
    rows = np.random.default_rng(0).normal(size=(30, 4, 8))
    sample = sampled(put(tmp_path / "a.h5", rows))
    order = sorted(range(30), key=lambda number: f"P{number}")
    np.testing.assert_allclose(sample.vectors, rows[order].mean(1)[::5])
    assert sample.lengths == [4] * 6
    assert sample.title == "a.h5: 30 proteins, 8 features"
    assert sample.caption.startswith("a sample of 6 records is drawn, one of every 5; vectors are averages")
    figure = draw(sample)
    assert figure.get_supxlabel() == sample.caption


def test_files_of_other_programs_have_one_map_and_no_levels(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float16)
    _, (whole, norms, *_) = drawn(put(tmp_path / "a.h5", rows))
    assert whole.get_title("left") == "All 8 features"
    assert list(norms.lines) == []


@pytest.mark.parametrize("shape", [(2, 5), (20, 5), (5, 20), (6, 1), (7, 2)])
def test_principal_components_are_those_of_a_decomposition(shape):
    vectors = np.random.default_rng(0).normal(size=shape) + 3
    points, shares = principal_components(vectors)
    _, values, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    expected = np.zeros((shape[0], 2))
    expected[:, : len(values)] = ((vectors - vectors.mean(0)) @ directions.T)[:, :2]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-7)
    np.testing.assert_allclose(shares[: len(values)], (values**2 / (values**2).sum())[:2], atol=1e-12)
    assert (points.max(0) >= -points.min(0)).all()


@pytest.mark.parametrize("scale", ["none", "feature", "block"])
def test_maps_are_of_scaled_features_and_the_rest_is_not(stores, scale):
    sample = sampled(stores["h5", "mean"])
    figure = draw(sample, 48, scale)
    figure.draw_without_rendering()
    blocks = np.split(sample.vectors, [32, 48, 64], axis=1)
    divided = {
        "none": blocks,
        "feature": [block / block.std(0) for block in blocks],
        "block": [block / np.sqrt(block.var(0).mean()) for block in blocks],
    }[scale]
    whole = np.concatenate(divided, axis=1)
    for ax, width in zip(figure.axes, (48, 128), strict=False):
        points, _ = principal_components(whole[:, :width])
        assert np.allclose(np.abs(ax.collections[0].get_offsets()), np.abs(points), atol=1e-8)
    plain = draw(sample, 48)
    plain.draw_without_rendering()
    for ax, other in zip(figure.axes[3:], plain.axes[3:], strict=True):
        for drawn_, expected in zip(ax.collections, other.collections, strict=True):
            assert np.array_equal(drawn_.get_offsets(), expected.get_offsets())
    note = figure.get_supxlabel()
    assert ("divided by" in note) == (scale != "none")


def test_features_without_variance_are_scaled_without_a_warning(stores, recwarn):
    sample = replace(sampled(stores["h5", "mean"]), vectors=np.ones((30, 128)))
    for scale in ("feature", "block"):
        assert np.array_equal(sampling.scale_features(sample, scale), sample.vectors)
    assert not recwarn.list


def test_an_unknown_scale_is_refused(stores, tmp_path):
    with pytest.raises(ValueError, match="expected scale to be one of 'none', 'feature', 'block', got 'all'"):
        plot_store(stores["h5", "mean"], tmp_path / "x.png", scale="all")


def test_equal_vectors_are_drawn_without_a_warning(tmp_path, recwarn):
    for rows in (np.zeros((3, 4)), np.ones((3, 4))):
        plot_store(put(tmp_path / "a.h5", rows), tmp_path / "a.png")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.h5", "-o", "a.png"), "expected an embedding file or folder at gone.h5, got nothing there"),
        (
            ("empty.h5", "-o", "a.png"),
            "expected one dataset a protein, of floating-point numbers of 1 or 2 dimensions and "
            "one width, in empty.h5, got",
        ),
        (("one.h5", "-o", "a.png"), "expected at least two records to draw, got 1 in one.h5"),
        (("two.h5", "-o", "a.png", "--width", "9"), "expected a width from 1 to 8, got 9"),
        (("two.h5", "-o", "a.png", "--width", "0"), "expected a width from 1 to 8, got 0"),
        (("two.h5", "-o", "no/a.png"), "expected a folder no to write to, got nothing there"),
        (("two.h5", "-o", "a.gif"), "expected a picture that ends in .png, .pdf, .svg, got 'a.gif'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, records in (("empty", 0), ("one", 1), ("two", 2)):
        put(tmp_path / f"{name}.h5", np.eye(8)[:records])
    result = CliRunner().invoke(main, ["plot", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_a_width_that_is_not_there_lists_the_levels(stores, tmp_path):
    with pytest.raises(
        ValueError, match=r"from 1 to 128 \(levels: 28K 32, 90K 48, 207K 64, 1M 128\), got 129"
    ):
        plot_store(stores["h5", "mean"], tmp_path / "a.png", width=129)


def test_without_matplotlib_it_says_how_to_install_it(stores, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["plot", str(stores["h5", "mean"]), "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert result.stderr == "Error: expected matplotlib, got none: pip install rd_torch[plot]\n"


def test_drawing_changes_nothing_global(stores, tmp_path):
    code = f"""
import rd_torch, matplotlib, sys
settings = lambda: dict(dict.items(matplotlib.rcParams))  # to ask it for the backend would choose one
before = settings()
rd_torch.plot_store({str(stores["h5", "mean"])!r}, {str(tmp_path / "a.png")!r})
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_says_where_the_picture_is(stores, tmp_path):
    path = tmp_path / "a.png"
    result = CliRunner().invoke(main, ["plot", str(stores["pt", "none"]), "-o", str(path), "--width", "64"])
    assert result.exit_code == 0, result.output
    assert result.stderr == f"Wrote the picture to {path}.\n"
    assert path.is_file()
