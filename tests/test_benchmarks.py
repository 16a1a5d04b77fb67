"""The benchmarks in small: they run, compare what they say, and leave a result that the page is made of."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[1]
SMALL = ["--level", "35M", "--layers", "1"]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text())
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script with arguments, in this process, which has imported torch already; its result."""

    def go(script, *arguments):
        path = tmp_path / "result.json"
        module = importlib.import_module(f"benchmarks.speed.{script}")
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments), "--output", str(path)])
        module.main()
        result = json.loads(path.read_text())
        assert result["command"].startswith(f"python -m benchmarks.speed.{script} {arguments[0]}")
        return result

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


def test_speed_compares_esmc_with_transformers(run):
    pytest.importorskip("transformers.models.esmc", reason="needs a transformers with ESM-C")
    options = [
        "--dtype",
        "float32",
        "--lengths",
        "30",
        "--tokens",
        "128",
        "--rounds",
        "1",
        "--budgets",
        "128",
    ]
    rows = run("speed", "--level", "300M", "--layers", "1", *options)["rows"]
    names = ["rd chain", "own 300M alone", "sum of own backbones alone", "transformers sdpa"]
    assert [row["contender"] for row in rows] == names
    assert all(row["tokens/s"] > 0 for row in rows)


@linux
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


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


@pytest.mark.slow
def test_random_backbones_reach_what_the_recipe_asks_for(run, data):
    options = ["--residues", "60", "--fit-residues", "2000", "--layers", "2", "--data", data]
    result = run("half_precision", "650M", *options)
    growth, channels = numbers(result["environment"]["asked for"])
    for level in ("8M", "35M", "150M", "650M"):
        reached, low, high, *_ = numbers(result["environment"][f"{level} reached"])
        assert reached == pytest.approx(growth, rel=0.1)
        assert [low, high] == pytest.approx([channels, channels], rel=0.2)
    errors = {(row["level"], row["backbones"]): row["error, mean"] for row in result["rows"]}
    assert len(errors) == 4 * 4


@pytest.mark.slow
def test_int8_stands_beside_half_precision(run, data):
    rows = run("quantisation", "mini", "--residues", "300", "--rounds", "1", "--data", data)["rows"]
    weights = {row["backbones"]: row["weights, MiB"] for row in rows}
    errors = {row["backbones"]: row["1M, mean error"] for row in rows}
    assert errors.pop("float32") == 0
    assert min(errors.values()) == errors["float16"] > 0
    assert weights["float16"] == pytest.approx(weights["float32"] / 2, rel=0.02)
    assert weights["int8, torchao, weights alone"] < weights["float16"]


@pytest.mark.slow
def test_exported_files_say_what_the_model_says(run, data):
    rows = run("exported", *SMALL, "--rounds", "1", "--data", data)["rows"]
    assert {(row["file"], row["residues"]) for row in rows} == {
        (suffix, residues)
        for suffix in (".onnx", ".pt2")
        for residues in ("4 x 250", "60, 120, 180, 250", "1022")
    }
    assert max(row["error, largest"] for row in rows) < 1e-4
    assert min(row["speed over the model's"] for row in rows) > 0


@pytest.mark.slow
@linux
def test_everybody_runs_with_the_weights_on_disk(run, data):
    options = ["--tokens", "512", "--budgets", "512", "--data", data]
    rows = run("offloading", *SMALL, *options)["rows"]
    names = [row["contender"] for row in rows]
    assert names == ["rd chain", "own 35M alone", "transformers sdpa", "fair-esm"]
    assert len({row["tokens a load"] for row in rows}) == 1
    assert rows[0]["chain's speed over it"] == 1


@pytest.mark.slow
@linux
def test_a_training_step_is_measured_in_time_and_memory(run):
    options = ["--level", "35M", "--layers", "3", "--residues", "254", "--rounds", "1"]
    rows = run("training_cost", *options)["rows"]
    activations = {(row["trains"], row["contender"]): row["activations, MiB"] for row in rows}
    assert len(activations) == 6
    assert activations["full", "rd chain, checkpointing"] < activations["full", "rd chain"]
    assert activations["full", "rd chain"] < activations["full", "fair-esm"]
    assert {row["times fair-esm's"] for row in rows if row["contender"] == "fair-esm"} == {1}


@pytest.mark.slow
@linux
def test_loading_is_measured_in_both_formats(run):
    rows = run("loading", "--rounds", "1", "--shape", "2", "64", "4")["rows"]
    assert [(row["library"], row["file"], row["dtype"]) for row in rows] == [
        ("rd_torch", "safetensors", "float32"),
        ("rd_torch", "pt", "float32"),
        ("fair-esm", "pt", "float32"),
        ("rd_torch", "safetensors", "bfloat16"),
        ("rd_torch", "pt", "bfloat16"),
    ]
    assert min(row["load, s"] for row in rows) >= 0


def test_the_page_of_results_is_made_of_the_result_files():
    folder = ROOT / "benchmarks" / "results"
    page = (folder / "README.md").read_text()
    assert page == report.page(folder), "run python -m benchmarks.report"
    assert len(re.findall("^## ", page, re.M)) == len(list(folder.rglob("*.json"))) > 0
    assert "python benchmarks/" not in page


def module_of(script):
    return ".".join(script.relative_to(ROOT).with_suffix("").parts)


def test_commands_on_pages_name_scripts():
    pages = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        named = set(re.findall(r"python -m (benchmarks[\w.]+)", page.read_text()))
        assert named <= set(map(module_of, SCRIPTS)), page


@pytest.mark.parametrize("script", SCRIPTS, ids=module_of)
def test_a_script_says_how_it_is_run_and_the_guide_says_what_it_asks(script):
    command = f"python -m {module_of(script)}"
    assert re.search(rf"^    {command}\b", script.read_text(), re.M)
    assert command in (ROOT / "benchmarks" / "README.md").read_text()


def test_links_of_the_guide_lead_somewhere():
    for page in (ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "results" / "README.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert links
        assert all((page.parent / link).exists() for link in links)


@pytest.mark.slow
@linux
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
