"""The benchmarks in small: they run, compare what they say, and leave a result that the page is made of."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.report import command_of_today

ROOT = Path(__file__).parents[1]
SMALL = ["--level", "35M", "--layers", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script with arguments, in this process, which has imported torch already; its result."""

    def go(script, *arguments):
        path = tmp_path / "result.json"
        module = importlib.import_module(f"benchmarks.speed.{script}")
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments), "--output", str(path)])
        module.main()
        return json.loads(path.read_text())

    return go


def test_speed_compares_everybody_in_every_dtype(run):
    options = ["--dtype", "float32", "bfloat16", "--lengths", "30", "--tokens", "128", "--rounds", "1"]
    result = run("speed", *SMALL, *options, "--budgets", "40", "128")
    assert "no result" in result["title"]  # backbones were cut
    rows = {(row["dtype"], row["contender"]): row for row in result["rows"]}
    for dtype in ("float32", "bfloat16"):
        assert rows[dtype, "rd chain"]["chain's speed over it"] == 1
        for contender in ("own 35M alone", "sum of own backbones alone", "fair-esm", "transformers sdpa"):
            row = rows[dtype, contender]
            assert row["tokens/s"] > 0
            assert row["chain's speed over it"] == pytest.approx(
                1 / row["chain's time over it"], rel=0.01, abs=0.001
            )
    assert ("bfloat16", "fair-esm float32") in rows


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_pass_takes_a_third_of_fair_esms_memory(run):
    options = ["--batch", "2", "--residues", "1022", "--dtype", "float32"]
    rows = run("memory", *SMALL, *options)["rows"]
    shares = {row["contender"]: row["share of fair-esm's"] for row in rows}
    assert shares.pop("fair-esm") == 1
    assert shares
    assert max(shares.values()) < 1 / 3


def test_the_cost_of_a_fit_is_split_into_its_parts(run, data):
    options = ["--residues", "500", "--data", str(data)]
    rows = run("fit_cost", *SMALL, *options)["rows"]
    assert len(rows) >= 3
    seconds = {row["part"]: row["seconds"] for row in rows}
    shares = {row["part"]: row["share of the forward passes"] for row in rows}
    assert len(seconds) == len(rows)
    for part, share in shares.items():
        assert seconds[part] >= 0
        if share == 1:
            assert seconds[part] > 0
    together = shares.pop("moments and solving together")
    assert together > 0
    assert sum(share == 1 for share in shares.values()) == 1
    assert any(abs(a + b - together) < 0.001 for a in shares.values() for b in shares.values())


def test_half_precision_is_given_per_added_block(run, data):
    rows = run("half_precision", "mini", "--residues", "500", "--data", str(data))["rows"]
    errors = {(row["level"], row["backbones"]): row["error, mean"] for row in rows}
    assert len(errors) == 4 * 4
    for level in ("28K", "90K", "207K", "1M"):
        assert errors[level, "float16, float32 residual"] < errors[level, "bfloat16, float32 residual"] / 4
        assert errors[level, "bfloat16, float32 residual"] < 0.05


def test_the_page_holds_every_result():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["title"] in page
        assert command_of_today(result["command"]) in page


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in KiB")
def test_embedding_fifty_thousand_records_takes_the_memory_of_two_thousand(run):
    first, second = run("proteome", "--memory")["rows"]
    assert (first["records"], second["records"]) == (2_000, 50_000)
    assert second["peak memory, MiB"] <= 1.1 * first["peak memory, MiB"]


def test_the_share_of_the_passes_is_of_the_same_batches(run, data):
    options = ["--data", data, "--proteins", "4", "--part", "2"]
    rows = run("proteome", *options)["rows"]
    assert len({row["residues"] for row in rows}) == 1
    assert {(row["model"], row["store"]) for row in rows} == {
        (model, store)
        for model in ("8M + 35M, random weights", "esm2-rd-mini")
        for store in ("pooled, .parquet", "per residue, .h5")
    }
    for row in rows:
        assert 0 < row["worst part"] <= row["share of the passes"]
