"""What the README says, typed as it says."""

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import esm
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import random_esm2

from rd_torch import RDModel, hardware
from rd_torch.cli import main
from rd_torch.exporting import OLDEST_EXPORTER
from rd_torch.weights import PublishedOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def pretend_to_download(monkeypatch):
    """The shipped family in place of whatever the README would download."""
    load = RDModel.from_pretrained

    def load_here(name, level=None, **options):
        if str(name) != "singhlab/plm_reverse_distillation":
            return load(name, level, **options)
        assert options.pop("backbones", {}).keys() <= {level}
        assert all(
            option in PublishedOptions.__annotations__ for option in options.keys() - {"dtype", "device"}
        )
        return load("esm2-rd-mini")

    monkeypatch.setattr(RDModel, "from_pretrained", load_here)


@pytest.mark.capability
def test_python_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(esm.pretrained, "esm2_t6_8M_UR50D", lambda: (random_esm2(1, 32, 2), None))
    monkeypatch.setattr(esm.pretrained, "esm2_t12_35M_UR50D", lambda: (random_esm2(1, 48, 2), None))
    pretend_to_download(monkeypatch)
    names = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="(lightning|transformers|accelerate|torch)")
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    emulated = hardware.is_emulated(torch.device("cpu"), torch.bfloat16)
    ours = [str(each.message) for each in said if each.category is UserWarning]
    assert ours == emulated * ["cpu computes bfloat16 in emulation: results are right, but float32 is faster"]
    assert names["out"].embeddings.shape == (2, 22, 128)
    assert names["vectors"].shape == (2, 128)
    assert names["nested"].shape == (10, 128)
    assert list(names["chain"].backbones) == ["8M"]


def test_shell_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "benchmarks" / "demo.fasta", "proteins.fasta")
    for level, width in (("28K", 32), ("90K", 48)):  # what people already have
        with h5py.File(f"{level}.h5", "w") as file:
            file["P1"] = np.ones(width)
    Path("others").mkdir()
    shutil.copy("proteins.fasta", "others")
    Path("table.csv").write_text("clone,heavy,light\nc1,MKTAYIAKQRQ,GSHMLEDPVDA\n")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("rd-torch")]
    assert len(lines) == 12
    if hardware.is_older(torch.__version__, OLDEST_EXPORTER):
        lines = [line for line in lines if not line.startswith("rd-torch export")]
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.output)


def test_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"make ([a-z]+)", " ".join(blocks("sh")))
    assert set(named) == {"demo", "test"} <= set(targets)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert all((ROOT / link).is_file() for link in links)


def test_the_table_of_levels_is_the_checkpoints():
    config = json.loads((ROOT / "checkpoints/esm2-rd-mini/config.json").read_text())
    losses = json.loads((ROOT / "checkpoints/esm2-rd-mini/losses.json").read_text())
    explained = [None, *config["explained"]]
    for level, shares in zip(config["levels"], explained, strict=True):
        cells = [
            level["name"],
            level["num_layers"],
            level["width"],
            f"{losses[level['name']]['validation_loss']:.3f}",
        ]
        cells += [f"{shares[key]:.3f}" for key in ("r2", "kept")] if shares else ["", ""]
        assert f"| {' | '.join(map(str, cells))} |" in README


@pytest.mark.parametrize("name", ["README.md", "rd_torch/README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_pages_name_only_files_that_exist(name):
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:tests|checkpoints|benchmarks|rd_torch)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path == "rd_torch/checkpoints/", path
