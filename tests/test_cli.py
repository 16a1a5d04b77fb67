import gzip
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import rd_torch
from rd_torch import sums
from rd_torch.candidates import Candidates
from rd_torch.cli import main
from rd_torch.reading import Fasta
from rd_torch.store import FORMATS
from rd_torch.weights.published import Choice

DEMO = Path(__file__).parents[1] / "benchmarks" / "demo.fasta"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code != 0
    assert not result.exception or isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(">a/1 first\nmktayiakqr\n>b\nGGJG-\n>c\nMKLVWA*\n")
    return path


def test_embed_says_its_default_model_and_writes_what_python_gives(tmp_path):
    result = run("embed", DEMO, "-o", tmp_path / "out.h5")
    assert result.exit_code == 0, result.output
    assert (
        "Model esm2-rd-mini (the shipped family; --model names another), level 1M, width 128" in result.stderr
    )
    proteins = list(Fasta(DEMO))
    expected = rd_torch.embed(
        rd_torch.RDModel.from_pretrained("esm2-rd-mini"), [protein.sequence for protein in proteins]
    )
    with h5py.File(tmp_path / "out.h5") as file:
        for protein, vector in zip(proteins, expected, strict=True):
            assert np.array_equal(file[protein.identifier], vector)
        assert file.attrs["model"] == "esm2-rd-mini"
        assert file.attrs["pool"] == "mean"


def test_the_same_file_twice_gives_the_same_vectors(tmp_path):
    for name in ("one.h5", "two.h5"):
        assert run("embed", DEMO, "-o", tmp_path / name, "--pool", "none").exit_code == 0
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "two.h5") as two:
        assert list(one) == list(two)
        assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("option", "value"), [("--width", "48"), ("--level", "90K")])
def test_width_and_level_cut_to_the_prefix(tmp_path, fasta, option, value):
    run("embed", fasta, "-o", tmp_path / "all.h5")
    result = run("embed", fasta, "-o", tmp_path / "cut.h5", option, value)
    assert "level 90K, width 48" in result.stderr
    with h5py.File(tmp_path / "all.h5") as whole, h5py.File(tmp_path / "cut.h5") as cut:
        assert set(cut) == {"a%2F1", "b", "c"}
        assert all(np.array_equal(cut[name], whole[name][:48]) for name in cut)
        assert list(cut.attrs["levels"]) == ["28K", "90K"]


def test_another_width_of_a_finished_file_is_refused_by_that_name(tmp_path, fasta):
    run("embed", fasta, "-o", tmp_path / "out.h5")
    error = refused("embed", fasta, "-o", tmp_path / "out.h5", "--width", "48")
    assert "expected levels ('28K', '90K', '207K', '1M')" in error
    assert "got ('28K', '90K')" in error


def test_options_reach_the_file(tmp_path, fasta):
    packed = tmp_path / "in.fasta.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    options = ("--pool", "none", "--max-length", "4", "--save-dtype", "float16", "--dtype", "bfloat16")
    result = run("embed", packed, "-o", tmp_path / "out.h5", *options, "--device", "cpu")
    assert "sequences cut to the maximal length: 3" in result.stderr
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["b"].shape == (4, 128)
        assert file["b"].dtype == np.float16
        assert file.attrs["backbone_dtype"] == "bfloat16"


def test_corrections_are_counted_in_one_warning_and_refused_when_strict(tmp_path, fasta):
    result = run("embed", fasta, "-o", tmp_path / "out.h5")
    assert (
        "Warning: sequences whose '*' at the end was dropped: 1; letters that are no residue, read as X: 2"
        in result.stderr
    )
    error = refused("embed", fasta, "-o", tmp_path / "strict.h5", "--strict")
    assert "got 'J' at position 3, in record b (line 3 of" in error
    assert not (tmp_path / "strict.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "129"), "width from 1 to 128 (levels: 28K 32, 90K 48, 207K 64, 1M 128), got 129"),
        (("--width", "0"), "width from 1 to 128"),
        (("--level", "3B"), "level to be one of '28K', '90K', '207K', '1M', got '3B'"),
        (("--level", "90K", "--width", "3"), "expected --width or --level, got both"),
        (
            ("--model", "nowhere"),
            "expected a checkpoint's folder, the name of a shipped checkpoint (esm2-rd-mini)",
        ),
        (("--device", "warp"), "expected a device that this machine has, got 'warp'"),
        (("--device", "cuda:99"), "expected a device that this machine has, got 'cuda:99'"),
        (
            ("--pool", "median"),
            "one or several of 'mean', 'max', 'std', 'cls', each once, or 'none', got 'median'",
        ),
        (("--save-dtype", "bfloat16"), "save_dtype to be one of 'float32', 'float16' in .h5, got 'bfloat16'"),
        (
            ("--format", "parquet", "--pool", "none"),
            "'std', 'cls' in .parquet, got 'none'",
        ),
    ],
)
def test_wrong_options_get_one_clear_line_and_no_file(tmp_path, fasta, arguments, message):
    error = refused("embed", fasta, "-o", tmp_path / "out.h5", *arguments)
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_wrong_files_get_one_clear_line(tmp_path, fasta):
    assert "nothing there" in refused("embed", tmp_path / "gone.fasta", "-o", tmp_path / "out.h5")
    assert "expected a folder" in refused("embed", fasta, "-o", tmp_path / "no" / "out.h5")
    assert "output that ends in .h5, .parquet, .pt" in refused("embed", fasta, "-o", tmp_path / "out.csv")
    (tmp_path / "folder.h5").mkdir()
    assert "got something else: choose another output" in refused(
        "embed", fasta, "-o", tmp_path / "folder.h5"
    )
    assert "is a file" in refused("fit", fasta, "-o", fasta)
    assert "first line starts with '>'" in refused("embed", __file__, "-o", tmp_path / "out.h5")


def test_fit_writes_a_checkpoint_that_embed_and_info_read(tmp_path):
    options = ("--levels", "28K,207K", "--added", "40", "--regressor", "ols", "--predict-from", "previous")
    result = run("fit", DEMO, "-o", tmp_path / "chain", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[2].split()[:6] == ["207K", "ESM-2", "4", "4", "64", "72"]
    info = run("info", tmp_path / "chain")
    assert "predict_from  previous" in info.stdout
    assert '"fasta": "demo.fasta"' in info.stdout
    assert '"sequences": 22' in info.stdout
    assert run("embed", DEMO, "-o", tmp_path / "out.h5", "--model", tmp_path / "chain").exit_code == 0
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file.attrs["widths"]) == [32, 72]


def test_a_killed_fit_goes_on_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SECONDS_BETWEEN_SAVES", 0)
    options = ("--levels", "28K,90K", "--tokens-per-batch", 40)
    assert run("fit", DEMO, "-o", tmp_path / "whole", *options).exit_code == 0
    passes, add = [], Candidates.add_moments

    def dying(*arguments):
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(Candidates, "add_moments", dying)
    assert run("fit", DEMO, "-o", tmp_path / "chain", *options).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.part", "whole"]
    (tmp_path / "other.fasta").write_text(">a\nMKV\n")
    other = refused("fit", tmp_path / "other.fasta", "-o", tmp_path / "chain", *options)
    assert "expected the sequences with which the fit in" in other
    assert run("fit", DEMO, "-o", tmp_path / "chain", "--levels", "28K,90K").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain", "other.fasta", "whole"]
    for name in ("config.json", "maps.safetensors", "reconstruction.safetensors"):
        assert (tmp_path / "chain" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(passes) == 6 + 1, "of six windows one was begun twice"


def test_fit_refuses_what_cannot_be(tmp_path):
    out = ("-o", tmp_path / "chain")
    assert "--added as numbers like 16,16 or 'all', got 'many'" in refused(
        "fit", DEMO, *out, "--added", "many"
    )
    assert "level to be one of" in refused("fit", DEMO, *out, "--levels", "28K,9B")
    assert "level to be one of" in refused("fit", DEMO, *out, "--levels", "")
    backwards = refused("fit", DEMO, *out, "--levels", "207K,28K")
    assert "where widths do not grow, say how many" in backwards
    assert "protein/s" not in backwards, "options are checked before any sequence is read"
    assert "alpha of at least 0" in refused("fit", DEMO, *out, "--regressor", "ridge", "--alpha", "-1")
    assert not (tmp_path / "chain").exists()


def test_info_shows_the_shipped_family():
    output = run("info").stdout
    assert output.splitlines()[0] == "esm2-rd-mini"
    assert [line.split()[0] for line in output.splitlines()[3:7]] == ["28K", "90K", "207K", "1M"]


OPTIONS = [
    (name, option)
    for name, command in main.commands.items()
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[f"{name} {each.name}" for name, each in OPTIONS])
def test_every_option_says_in_sentences_what_it_is_and_what_happens_without_it(name, option):
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    says_default = isinstance(option.show_default, str) or option.default not in (None, ())
    assert says_default or option.required or option.is_flag


def test_help_lists_the_commands_in_order_each_in_a_line_of_its_own():
    lines = CliRunner().invoke(main, ["--help"], terminal_width=80).output.splitlines()
    listed = lines[lines.index("Commands:") + 1 :][: len(main.commands)]
    assert [line.split()[0] for line in listed] == list(main.commands)
    assert list(main.commands)[:3] == ["embed", "combine", "plot"]
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_shows_options_by_groups():
    lines = run("embed", "--help").stdout.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        *("Output:", "Model:", "Input:", "Speed:", "Several processes:", "Cluster:"),
        *("The authors' maps (singhlab/plm_reverse_distillation):", "Other:"),
    ]
    assert lines[lines.index("Output:") + 1].startswith("  -o, --output PATH")
    assert "Options:" in run("env", "--help").stdout.splitlines()


def test_help_shows_the_formats_and_defaults_of_the_package():
    assert f"--format [{'|'.join(FORMATS)}]" in run("embed", "--help").stdout
    text = " ".join(run("info", "--help").stdout.split())
    for field in fields(Choice):
        assert (
            f"[default: {field.default}]"
            in text.split(f"--{field.name.replace('_', '-')} ")[1].split("--")[0]
        )


def test_a_file_is_not_taken_for_the_address_of_a_cluster(tmp_path, fasta):
    error = refused("embed", "--cluster", fasta, "-o", tmp_path / "out.parquet")
    assert f"got '{fasta}': write files before --cluster" in error


def test_output_that_nobody_reads_ends_a_command_quietly():
    """As `rd-torch info | head -1` does when `head` has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rd_torch.cli", "info"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == b""


@pytest.mark.parametrize("command", main.commands)
def test_help_of_a_command_comes_without_torch(command):
    code = "import sys, rd_torch.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True
    )
    assert process.stdout.rstrip().endswith("False")


@pytest.mark.alone
def test_help_comes_within_half_a_second_and_without_torch():
    command = [
        sys.executable,
        "-c",
        "import sys, rd_torch.cli as c\ntry: c.main(['--help'])\nfinally: print('torch' in sys.modules)",
    ]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - start)
    assert output.rstrip().endswith("False")
    assert "embed" in output
    assert min(seconds) < 0.5
