"""Long proteins in overlapping pieces: weights sum to one, maps commute, prefixes stay prefixes."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import random_esm2, random_sequence, random_stages
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_torch
from rd_torch import batching
from rd_torch.cli import main
from rd_torch.nesting import Nesting
from rd_torch.pieces import Pieces
from rd_torch.store import open_store

LONG, SHORT = random_sequence(50, 1), random_sequence(12, 2)


@pytest.fixture(scope="module")
def model():
    backbones = {"a": random_esm2(2, 16, 4), "b": random_esm2(1, 24, 4, seed=1)}
    return rd_torch.RDModel(backbones, random_stages(widths={"a": 16, "b": 24})).eval()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 150))
def test_pieces_cover_every_residue_and_their_weights_sum_to_one(length, overlap, residues):
    pieces = Pieces.of((length, min(overlap, length - 1)))
    starts, weights = pieces.starts(residues), pieces.weights(residues)
    assert starts[0] == 0
    assert starts[-1] == max(0, residues - length)
    steps = np.diff(starts)
    assert all(0 < step <= length - pieces.overlap for step in steps)
    total = torch.zeros(residues, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + len(weight)] += weight
        assert (weight > 0).all()
    torch.testing.assert_close(total, torch.ones(residues, dtype=torch.float64))
    assert len(starts) == 1 or residues > length


def test_weights_fall_evenly_towards_the_ends_where_two_pieces_meet():
    weights = Pieces.of((8, 4)).weights(12)  # pieces of 8 that begin at 0 and 4: ramps 4 3 2 1 and 1 2 3 4
    expected = torch.tensor([1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5], dtype=torch.float64)
    torch.testing.assert_close(weights[0], expected)
    torch.testing.assert_close(weights[1], expected.flip(0))


def by_hand(model, sequence, pieces):
    """The formula, from embeddings of each piece alone, in float64."""
    ramps, blended = np.zeros(len(sequence)), np.zeros((len(sequence), model.embed_dim))
    for start in pieces.starts(len(sequence)):
        (rows,) = rd_torch.embed(model, [sequence[start : start + pieces.length]], pool="none")
        ramp = np.minimum(np.arange(1, len(rows) + 1), np.arange(len(rows), 0, -1))
        blended[start : start + len(rows)] += ramp[:, None] * rows.astype(np.float64)
        ramps[start : start + len(rows)] += ramp
    return blended / ramps[:, None]


@pytest.mark.parametrize("windows", [(20, 5), (20, 0), (16, 15), 20, (49, 10)], ids=str)
def test_a_long_sequence_is_the_blend_of_its_pieces(model, windows):
    expected = by_hand(model, LONG, Pieces.of(windows))
    rows, short = rd_torch.embed(model, [LONG, SHORT], pool="none", windows=windows, tokens_per_batch=60)
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    np.testing.assert_array_equal(short, rd_torch.embed(model, [SHORT], pool="none")[0])
    pooled = rd_torch.embed(model, [LONG, SHORT], windows=windows)
    np.testing.assert_allclose(pooled[0], expected.mean(0), atol=2e-5)
    assert np.abs(rows - rd_torch.embed(model, [LONG], pool="none")[0]).max() > 1e-3, "it is not the whole's"


def test_what_is_no_longer_than_a_window_is_as_without_windows_to_the_bit(model):
    whole = rd_torch.embed(model, [LONG, SHORT])
    np.testing.assert_array_equal(rd_torch.embed(model, [LONG, SHORT], windows=50), whole)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_prefixes_of_windowed_embeddings_are_those_of_the_shorter_chain_to_the_bit(model, pool):
    whole = rd_torch.embed(model, [LONG], pool=pool, windows=(20, 5))[0]
    np.testing.assert_array_equal(
        whole[..., :16], rd_torch.embed(model, [LONG], pool=pool, windows=(20, 5), width=16)[0]
    )


def test_windows_commute_with_the_maps(model):
    """Raw embeddings in windows, combined, are the nested ones in windows."""
    raw = {
        level: torch.tensor(
            rd_torch.embed(
                rd_torch.RDModel({level: backbone}, []).eval(), [LONG], pool="none", windows=(20, 5)
            )[0]
        )
        for level, backbone in model.backbones.items()
    }
    nested = rd_torch.embed(model, [LONG], pool="none", windows=(20, 5))[0]
    np.testing.assert_allclose(model.combine(raw).numpy(), nested, atol=2e-5)


@pytest.mark.parametrize("suffix", ["h5", "parquet", "pt"])
def test_a_store_says_which_proteins_were_windowed_and_how(model, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    proteins = [("long", LONG), ("short", SHORT), ("also", LONG[::-1])]
    rd_torch.embed_to_store(model, proteins, path, windows=(20, 5), tokens_per_batch=60)
    with open_store(path) as store:
        assert store.facts.windows == (20, 5)
        assert store.windowed == ["long", "also"]
        np.testing.assert_allclose(store["long"], by_hand(model, LONG, Pieces(20, 5)).mean(0), atol=2e-5)
    rd_torch.embed_to_store(model, proteins, path, windows=(20, 5))  # done is done
    for other in (None, (20, 6)):
        with pytest.raises(ValueError, match=r"expected windows .*20, 5"):
            rd_torch.embed_to_store(model, proteins, path, windows=other)
    plain = tmp_path / f"plain.{suffix}"
    rd_torch.embed_to_store(model, proteins, plain)
    with open_store(plain) as store:
        assert store.windowed == []
        assert store.facts.windows is None


def test_the_command_takes_windows(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    fasta = tmp_path / "in.fasta"
    fasta.write_text(f">long\n{LONG}\n>short\n{SHORT}\n")
    command = ["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(main, [*command, "--windows", "20"])
    assert result.exit_code == 0, result.output
    with open_store(tmp_path / "out.h5") as store:
        assert json.loads(store.facts.to_json())["windows"] == [20, 5]
        assert store.windowed == ["long"]
        np.testing.assert_allclose(store["long"], rd_torch.embed(model, [LONG], windows=20)[0], atol=2e-5)


def test_a_piece_without_memory_leaves_its_whole_protein_out(model, tmp_path, monkeypatch):
    attempt = batching._attempt

    def short_of_memory(compute, part, *others):
        refused = any(LONG[15:35] == sequence for _, sequence in part)
        return MemoryError("no room") if refused else attempt(compute, part, *others)

    monkeypatch.setattr(batching, "_attempt", short_of_memory)
    proteins = [("short", SHORT), ("long", LONG), ("also", LONG[::-1])]
    with pytest.warns(UserWarning, match="too many for the memory"):
        failures = rd_torch.embed_to_store(model, proteins, tmp_path / "out.h5", windows=(20, 5))
    assert list(failures) == ["long"]
    assert failures["long"].residues == 50
    assert failures["long"].line == 2
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["short", "also"]


@pytest.mark.parametrize("windows", [0, -3, (10, 10), (10, -1)], ids=str)
def test_windows_that_cannot_be_are_refused(model, windows):
    with pytest.raises(ValueError, match="expected windows of at least 1 residue with an overlap from 0"):
        rd_torch.embed(model, [SHORT], windows=windows)


def test_combined_stores_say_which_proteins_were_windowed(model, tmp_path):
    proteins = [("long", LONG), ("short", SHORT)]
    model.save_pretrained(tmp_path / "maps")
    nesting = Nesting.from_pretrained(tmp_path / "maps")
    inputs = {}
    for level, backbone in model.backbones.items():
        inputs[level] = tmp_path / f"{level}.h5"
        alone = rd_torch.RDModel({level: backbone}, []).eval()
        rd_torch.embed_to_store(alone, proteins, inputs[level], windows=(20, 5))
        rd_torch.embed_to_store(alone, proteins, tmp_path / f"{level}-whole.h5")
    rd_torch.combine_stores(nesting, inputs, tmp_path / "out.parquet")
    with open_store(tmp_path / "out.parquet") as store:
        assert store.windowed == ["long"]
        np.testing.assert_allclose(
            store["long"], rd_torch.embed(model, [LONG], windows=(20, 5))[0], atol=2e-5
        )
    mixed = inputs | {"b": tmp_path / "b-whole.h5"}
    with pytest.raises(ValueError, match=r"with the same --windows, got \(20, 5\) at level a, None at"):
        rd_torch.combine_stores(nesting, mixed, tmp_path / "mixed.h5")
