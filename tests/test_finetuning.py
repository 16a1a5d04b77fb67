"""The fine-tuning scripts in small: they resume, stop, and say which approach is better where one is."""

import json
import runpy
import sys
from functools import partialmethod

import pytest
import torch

import rd_torch
from benchmarks.finetuning.melting_temperature import MeltingTemperature
from benchmarks.finetuning.problem import Example
from benchmarks.finetuning.run import Run
from benchmarks.finetuning.secondary_structure import SecondaryStructure

SCRIPTS = {
    SecondaryStructure: "benchmarks.finetuning.finetune_residue",
    MeltingTemperature: "benchmarks.finetuning.finetune_sequence",
}
SMALL = ["--proteins", "24", "--proteins-valid", "12", "--residues", "40", "--seeds", "1"]
SMALL += ["--epochs", "2", "--epochs-head", "2"]


@pytest.fixture
def run(monkeypatch, tmp_path, data):
    """Runs a problem's script, tested on so many proteins; its rows, and the states it left."""

    def go(problem, folder, *arguments, tested=None):
        output = tmp_path / "result.json"
        places = ["--data", str(data), "--folder", str(tmp_path / folder), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["", *places, *SMALL, *arguments])
        if tested is not None:
            monkeypatch.setattr(problem, "read", partialmethod(shortened, problem.read, tested))
        runpy.run_module(SCRIPTS[problem], run_name="__main__", alter_sys=True)
        states = {path.stem: torch.load(path) for path in (tmp_path / folder).glob("*.pt")}
        return json.loads(output.read_text())["rows"], states

    return go


def shortened(problem, read, tested, *given):
    """What is read, with fewer proteins to test on."""
    sets = read(problem, *given)
    return sets | {"test": sets["test"][:tested]}


LEVELS = ["28K", "90K", "207K", "1M"]


def test_every_approach_runs_at_every_level(run, tmp_path):
    picture = tmp_path / "curves.png"
    rows, states = run(MeltingTemperature, "a", "--plot", str(picture), tested=50)
    assert [(row["approach"], row["level"]) for row in rows] == [
        ("training mean", ""),
        ("composition", ""),
        *[(approach, level) for approach in ("frozen", "LoRA", "full") for level in LEVELS],
    ]
    assert len(states) == 1 + 3 * 4
    assert picture.stat().st_size > 10_000
    trained = {(row["approach"], row["level"]): row["trained parameters"] for row in rows}
    assert trained["frozen", "1M"] < trained["LoRA", "1M"] < trained["full", "1M"]
    for state in states.values():
        progress = state["progress"]
        assert len(progress["curve"]) == progress["epoch"] <= 2
        assert progress["curve"][progress["best_epoch"] - 1] == max(progress["curve"])


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(run, monkeypatch, tmp_path):
    rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K").save_pretrained(tmp_path / "small")
    options = ["--approaches", "LoRA", "--model", str(tmp_path / "small"), "--seeds", "2"]
    whole, expected = run(SecondaryStructure, "whole", *options, tested=50)
    save = Run._save
    calls = []

    def cut_off(self, *arguments):
        save(self, *arguments)
        calls.append(self.name)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save", cut_off)
    for _ in range(40):
        try:
            rows, states = run(SecondaryStructure, "cut", *options, tested=50)
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) > 8
    assert rows == whole
    assert states.keys() == expected.keys()
    for name, state in states.items():
        for part, tensor in state["best"].items():
            assert torch.equal(tensor, expected[name]["best"][part]), (name, part)


def test_a_folder_of_other_choices_is_refused(run):
    run(MeltingTemperature, "a", "--approaches", "baseline")
    with pytest.raises(SystemExit, match=r"expected .* to be of .*'residues': 30.*, got .*'residues': 40"):
        run(MeltingTemperature, "a", "--approaches", "baseline", "--residues", "30")


def test_a_signal_in_the_composition_is_found_and_a_shuffled_one_is_not(run, monkeypatch):
    """The share of leucine is found from the composition; that of another protein is not."""
    read = MeltingTemperature.read

    def planted(self, data, residues, shift=0):
        sets = read(self, data, residues)
        for name, examples in sets.items():
            shares = [each.sequence.count("L") / len(each.sequence) * 10 for each in examples]
            moved = shares[shift:] + shares[:shift]
            sets[name] = [Example(e.sequence, share) for e, share in zip(examples, moved, strict=True)]
        return sets

    options = ["--approaches", "baseline", "--proteins", "400", "--epochs-head", "30"]
    monkeypatch.setattr(MeltingTemperature, "read", planted)
    found = run(MeltingTemperature, "planted", *options)[0][-1]
    assert float(found["Spearman"]) > 0.8
    monkeypatch.setattr(MeltingTemperature, "read", lambda *rest: planted(*rest, shift=1))
    lost = run(MeltingTemperature, "shuffled", *options)[0][-1]
    assert abs(float(lost["Spearman"])) < 0.2
