"""Residues become one vector by mean, maximum, deviation or `<cls>`, and by several of them at once."""

import json

import duckdb
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import random_sequence, tokens_of

import rd_torch
from rd_torch.cli import main
from rd_torch.pooling import pool_name, pools_of
from rd_torch.store import Facts, open_store

SEQUENCES = [random_sequence(length, length) for length in (5, 31, 1, 17, 12)]
PROTEINS = [(f"P{number}", sequence) for number, sequence in enumerate(SEQUENCES)]
SUFFIXES = ["h5", "parquet", "pt"]


@pytest.fixture(scope="module")
def mini():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="207K")


def formula(model, sequence, way, width=None):
    """The definition, in float64."""
    embeddings = model(tokens_of(sequence), width=width).embeddings[0].detach().double().numpy()
    residues = embeddings[1:-1]
    return {"mean": residues.mean(0), "max": residues.max(0), "std": residues.std(0), "cls": embeddings[0]}[
        way
    ]


@pytest.mark.parametrize("width", [None, 48, 20])
@pytest.mark.parametrize("way", ["mean", "max", "std", "cls"])
def test_each_way_is_its_formula_and_prefixes_are_prefixes_to_the_bit(mini, way, width):
    vectors = rd_torch.embed(mini, SEQUENCES, pool=way, width=width)
    assert vectors.dtype == np.float32
    for sequence, vector in zip(SEQUENCES, vectors, strict=True):
        np.testing.assert_allclose(vector, formula(mini, sequence, way, width), atol=2e-5)
    whole = rd_torch.embed(mini, SEQUENCES, pool=way)
    assert np.array_equal(vectors, whole[:, : vectors.shape[1]])


def test_the_deviation_of_one_residue_is_zero(mini):
    assert not rd_torch.embed(mini, ["M"], pool="std").any()


@pytest.mark.parametrize("ways", [["mean", "max"], ("std", "cls", "mean"), "max+std", ["cls"]], ids=str)
def test_several_stand_one_behind_the_other(mini, ways):
    vectors = rd_torch.embed(mini, SEQUENCES, pool=ways, width=48)
    each = [rd_torch.embed(mini, SEQUENCES, pool=way, width=48) for way in pools_of(pool_name(ways))]
    assert np.array_equal(vectors, np.concatenate(each, axis=1))
    assert rd_torch.embed(mini, [], pool=ways, width=48).shape == (0, 48 * len(each))


WRONG = ["median", [], ["mean", "mean"], ["mean", "none"], "", ["mean", "median"]]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_other_ways_are_refused(mini, wrong):
    with pytest.raises(
        ValueError,
        match=r"expected pool to be one or several of 'mean', 'max', 'std', 'cls', each once, or 'none'",
    ):
        rd_torch.embed(mini, ["MKT"], pool=wrong)


@pytest.mark.parametrize("pool", ["max", "cls", ["mean", "max"], ["std", "cls", "mean"]], ids=str)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_store_of_every_format_keeps_them_and_reads_prefixes_of_each(mini, tmp_path, suffix, pool):
    path = tmp_path / f"out.{suffix}"
    rd_torch.embed_to_store(mini, PROTEINS, path, pool=pool, tokens_per_batch=40)
    ways = pools_of(pool_name(pool))
    with open_store(path) as store:
        assert store.pool == store.facts.pool == "+".join(ways)
        assert store.facts.boundaries == tuple(64 * number for number in range(len(ways) + 1))
        assert store.shape == (5, 64 * len(ways))
        assert store.width == 64
        assert Facts.from_json(json.dumps(json.loads(store.facts.to_json()))) == store.facts
        whole = np.asarray(store)
        np.testing.assert_allclose(whole, rd_torch.embed(mini, SEQUENCES, pool=pool), atol=2e-5)
        for width in (64, 48, 32, 7):
            expected = np.concatenate([whole[:, 64 * k : 64 * k + width] for k in range(len(ways))], axis=1)
            assert np.array_equal(store.read(slice(None), width=width), expected)
            assert np.array_equal(store.read("P3", width=width), expected[3])
            assert torch.equal(
                store.read([4, 1], width=width, as_torch=True), torch.from_numpy(expected[[4, 1]])
            )
        assert store.read([], width=7).shape == (0, 7 * len(ways))
        assert store.lengths() == [len(sequence) for sequence in SEQUENCES]
        assert torch.equal(store.tensors(["P2"])[0], torch.from_numpy(whole[2]))
    rd_torch.embed_to_store(mini, PROTEINS, path, pool=pool)  # done is done
    with pytest.raises(ValueError, match=r"expected pool .*, with which .* was begun, got mean"):
        rd_torch.embed_to_store(mini, PROTEINS, path, pool="mean")


def test_other_programs_find_each_way(mini, tmp_path):
    pool = ["mean", "max", "cls"]
    for suffix in SUFFIXES:
        rd_torch.embed_to_store(mini, PROTEINS, tmp_path / f"out.{suffix}", pool=pool, width=48)
    expected = rd_torch.embed(mini, SEQUENCES, pool=pool, width=48)
    rows = duckdb.sql(
        f"""SELECT identifier, "max:28K", "max:90K" FROM '{tmp_path}/out.parquet/*.parquet'"""
    ).fetchall()
    for (_, first, second), vector in zip(rows, expected, strict=True):
        np.testing.assert_allclose([*first, *second], vector[48:96], atol=2e-5)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["P1"].shape == (144,)
        assert file.attrs["pool"] == "mean+max+cls"
        assert list(file.attrs["boundaries"]) == [0, 48, 96, 144]
    kept = torch.load(tmp_path / "out.pt" / "P1.pt")
    for key, start in (("mean_representations", 0), ("max_representations", 48), ("bos_representations", 96)):
        (vector,) = kept[key].values()
        np.testing.assert_allclose(vector, expected[1, start : start + 48], atol=2e-5)


def test_only_means_are_nested_afterwards(mini, tmp_path):
    backbone = rd_torch.RDModel({"28K": mini.backbones["28K"]}, [])
    rd_torch.embed_to_store(backbone, PROTEINS, tmp_path / "raw.h5", pool="max")
    nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini")
    with pytest.raises(ValueError, match="got pool 'max', which does not commute with the maps"):
        rd_torch.combine_stores(nesting, {"28K": tmp_path / "raw.h5"}, tmp_path / "out.h5")


@pytest.mark.parametrize("pool", ["max", "std", ["mean", "std"]], ids=str)
def test_long_sequences_in_windows_are_pooled_when_they_are_blended(mini, pool):
    (residues,) = rd_torch.embed(mini, [SEQUENCES[1]], pool="none", windows=(12, 4))
    exact = residues.astype(np.float64)
    known = {"mean": exact.mean(0), "max": exact.max(0), "std": exact.std(0)}
    expected = np.concatenate([known[way] for way in pools_of(pool_name(pool))])
    (vector,) = rd_torch.embed(mini, [SEQUENCES[1]], pool=pool, windows=(12, 4))
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_windows_have_no_cls(mini, tmp_path):
    for pool in ("cls", ["mean", "cls"]):
        with pytest.raises(ValueError, match="got 'cls': every piece has a <cls> of its own"):
            rd_torch.embed(mini, SEQUENCES, pool=pool, windows=12)
        with pytest.raises(ValueError, match="got 'cls': every piece has a <cls> of its own"):
            rd_torch.embed_to_store(mini, PROTEINS, tmp_path / "out.h5", pool=pool, windows=12)


@pytest.mark.parametrize("given", ["--pool max,cls", "--pool max --pool cls", "--pool max+cls"])
def test_the_command_takes_several(mini, tmp_path, given):
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS))
    command = ["embed", str(fasta), "-o", str(tmp_path / "out.parquet"), "--level", "207K", *given.split()]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with open_store(tmp_path / "out.parquet") as store:
        expected = rd_torch.embed(mini, SEQUENCES, pool=["max", "cls"])
        np.testing.assert_allclose(np.asarray(store), expected, atol=2e-5)


def test_a_picture_is_of_the_first_way(mini, tmp_path):
    rd_torch.embed_to_store(mini, PROTEINS, tmp_path / "both.h5", pool=["max", "mean"])
    rd_torch.plot_store(tmp_path / "both.h5", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1_000
