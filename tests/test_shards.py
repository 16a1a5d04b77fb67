"""A store that several processes write beside each other, in any order, dying as they like."""

import signal
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from helpers import random_sequence, tiny_model
from processes import begun

import rd_torch
from rd_torch.cli import main
from rd_torch.store import Shard, open_store

BUDGET = 8
PROTEINS = [(f"P{k % 110}", random_sequence(5 + 7 * k % 61, k)) for k in range(120)]
"""Ten of them share their identifier with another one."""

pytestmark = pytest.mark.filterwarnings("ignore:records whose identifier")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model, the proteins, and the stores that one process makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder / "model")
    fasta = "".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS)
    (folder / "in.fasta").write_text(fasta + ">broken\nMK1\n")
    for suffix in ("h5", "parquet", "pt"):
        assert run(folder, folder / f"whole.{suffix}").exit_code == 3
    return folder


def command(folder, output, *options):
    fixed = ["-o", output, "--model", folder / "model", "--tokens-per-batch", BUDGET]
    return [str(each) for each in ("embed", folder / "in.fasta", *fixed, *options)]


def run(folder, output, *options):
    return CliRunner().invoke(main, command(folder, output, *options))


def contents(path):
    """Names, vectors and what was left out."""
    with open_store(path) as store:
        listed = path.with_name(f"{path.name}.failed.tsv").read_text()
        return list(store), np.asarray(store), store.checksum, listed


def assert_whole(path, folder):
    for ours, expected in zip(contents(path), contents(folder / f"whole{path.suffix}"), strict=True):
        assert np.array_equal(ours, expected)
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.failed.tsv"}


@pytest.mark.parametrize("suffix", ["h5", "parquet", "pt"])
def test_the_last_shard_to_end_puts_the_store_together(folder, tmp_path, suffix):
    for number, order in enumerate(permutations((1, 2, 3))):
        output = tmp_path / str(number) / f"out.{suffix}"
        output.parent.mkdir()
        for shard in order[:-1]:
            result = run(folder, output, "--shard", f"{shard}/3")
            assert result.exit_code in (0, 3), result.output
            assert f"Shard {shard}/3 is done. The last shard to end will put" in result.stderr
            assert not output.exists()
        result = run(folder, output, "--shard", f"{order[-1]}/3")
        assert result.exit_code == 3, result.output
        assert "Wrote the embeddings to" in result.stderr
        assert "Left out 1 of the proteins." in result.stderr
        assert_whole(output, folder)
    assert run(folder, output, "--shard", "2/3").exit_code == 3, "done is done"


def test_a_shard_embeds_its_share_and_nothing_twice(model, tmp_path):
    residues = dict.fromkeys(range(1, 5), 0)

    def progress(number):
        def count(done, before):
            residues[number] += done * (not before)

        return count

    for _ in range(2):
        for number in residues:
            rd_torch.embed_to_store(
                model,
                PROTEINS,
                tmp_path / "out.h5",
                tokens_per_batch=BUDGET,
                shard=(number, 4),
                progress=progress(number),
            )
    total = sum(len(sequence) for _, sequence in PROTEINS)
    assert sum(residues.values()) == total
    assert max(residues.values()) < 0.4 * total


@pytest.mark.parametrize("suffix", ["h5", "parquet"])
def test_four_shards_that_are_killed_again_and_again_lose_and_double_nothing(folder, tmp_path, suffix):
    output = tmp_path / f"out.{suffix}"
    rng = np.random.default_rng(0)

    def shard(number):
        return begun(command(folder, output, "--shard", f"{number}/4"))

    def windows():
        return len(list(tmp_path.glob("*.part/windows/*.json")))

    processes, kills = {number: shard(number) for number in range(1, 5)}, 0
    deadline = time.monotonic() + 300
    while processes and time.monotonic() < deadline:
        time.sleep(0.05)
        if kills < 8 and windows() > 2 * kills:
            number = int(rng.choice(list(processes)))
            if processes[number].is_alive():
                processes[number].kill()
                processes[number].join()
                kills += 1
        for number, process in list(processes.items()):
            if not process.is_alive():
                assert process.exitcode in (0, 3, -signal.SIGKILL)
                if process.exitcode == -signal.SIGKILL:
                    processes[number] = shard(number)
                else:
                    del processes[number]
    assert kills > 3
    assert_whole(output, folder)


def test_who_dies_while_it_puts_the_store_together_is_replaced_by_finish(folder, tmp_path, monkeypatch):
    output = tmp_path / "out.h5"
    result = run(folder, output, "--finish")
    assert result.exit_code == 1
    assert "expected all windows of" in result.stderr.splitlines()[-1]
    assert "run its shard again first" in result.stderr
    assert run(folder, output, "--shard", "1/2").exit_code in (0, 3)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr("rd_torch.store.hdf5.HDF5.finish", full)
        assert run(folder, output, "--shard", "2/2").exit_code == 1
    assert not output.exists()
    result = run(folder, output, "--finish")
    assert result.exit_code == 3, result.output
    assert_whole(output, folder)
    assert run(folder, output, "--finish").exit_code == 3


def test_one_process_alone_finishes_what_shards_have_begun(folder, tmp_path):
    output = tmp_path / "out.parquet"
    assert run(folder, output, "--shard", "2/5").exit_code in (0, 3)
    assert run(folder, output, "--shard", "1/2").exit_code in (0, 3)
    assert run(folder, output).exit_code == 3
    assert_whole(output, folder)


def test_who_works_alone_and_shards_keep_out_of_each_others_way(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.store.work.PATIENCE", 0.1)
    output = tmp_path / "out.parquet"
    run(folder, output, "--shard", "1/3")
    part = Path(f"{output}.part")
    with FileLock(part / "2-of-3.shard"):
        for options in ((), ("--shard", "2/3")):
            result = run(folder, output, *options)
            assert result.exit_code == 1
            assert "got another process that does: wait for it" in result.stderr
        assert run(folder, output, "--shard", "3/3").exit_code in (0, 3), "another shard is nobody's concern"
    with FileLock(part / "lock"):
        result = run(folder, output, "--shard", "2/3")
        assert result.exit_code == 1
        assert "got another process that does: wait for it" in result.stderr
    assert run(folder, output, "--shard", "2/3").exit_code == 3
    assert_whole(output, folder)


def test_other_proteins_and_budgets_are_refused(folder, model, tmp_path):
    output = tmp_path / "out.h5"
    run(folder, output, "--shard", "1/2")
    with pytest.raises(ValueError, match="expected the sequences with which .* was begun"):
        rd_torch.embed_to_store(
            model, PROTEINS[::-1], output, name=str(folder / "model"), shard=(2, 2), tokens_per_batch=BUDGET
        )
    with pytest.raises(ValueError, match="expected tokens_per_batch 8, with which .* was begun, got 9"):
        rd_torch.embed_to_store(model, PROTEINS, output, shard=(2, 2), tokens_per_batch=9)


def test_who_ends_while_another_one_is_at_work_leaves_the_store_to_it(folder, tmp_path):
    """It still reads windows, and would not find them if they were put away."""
    output = tmp_path / "out.parquet"
    run(folder, output, "--shard", "1/2")
    with FileLock(Path(f"{output}.part") / "5-of-9.shard"):
        result = run(folder, output, "--shard", "1/1")
        assert result.exit_code == 3
        assert "Shard 1/1 is done. The last shard to end will put" in result.stderr
        assert "Left out 1 of its proteins." in result.stderr
        assert not output.exists()
    assert run(folder, output, "--shard", "5/9").exit_code == 3
    assert_whole(output, folder)


def test_a_process_a_device(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # for the same bits

    def ended(output, devices):
        process = begun(command(folder, output, "--devices", devices), tmp_path / "said")
        process.join()
        said = (tmp_path / "said").read_text()
        (tmp_path / "said").unlink()
        return process.exitcode, said

    output = tmp_path / "out.parquet"
    status, said = ended(output, "cpu,cpu")
    assert status == 3, said
    assert said.splitlines()[-2:] == [
        f"Wrote the embeddings to {output}.",
        f"Left out 1 of the proteins. {output}.failed.tsv lists them with the reasons.",
    ]
    assert_whole(output, folder)
    status, said = ended(tmp_path / "other.h5", "cpu,warp")
    assert status == 1
    assert "expected a device that this machine has, got 'warp'" in said
    assert "expected the process on every device to succeed, got exit status 1 on 'warp'" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "4/3"), "expected a shard from 1 to its count, got 4 of 3"),
        (("--shard", "0/3"), "expected a shard from 1 to its count, got 0 of 3"),
        (("--shard", "third"), "expected a shard as NUMBER/COUNT or auto, got 'third'"),
        (
            ("--shard", "auto"),
            "expected SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or RANK",
        ),
        (
            ("--shard", "1/2", "--finish"),
            "at most one of --devices, --shard, --finish, --cluster, got --shard and --finish",
        ),
        (("--devices", "cpu,cpu", "--device", "cpu"), "expected --device or --devices, got both"),
        (("--devices", "cpu,"), "expected --devices as names with commas between them, got 'cpu,'"),
        (("--shard", "1/2", "--cluster"), "got --shard and --cluster"),
    ],
)
def test_wrong_options_get_one_clear_line(folder, tmp_path, monkeypatch, options, message):
    for name in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    result = run(folder, tmp_path / "out.parquet", *options)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.part/windows/*"))


def test_pipes_are_not_for_several_devices(folder, tmp_path):
    result = CliRunner().invoke(
        main, ["embed", "-", "-o", str(tmp_path / "out.h5"), "--devices", "cpu,cpu"], input=">p\nMKV\n"
    )
    assert result.exit_code == 1
    assert "expected files that every process can read, got standard input" in result.stderr


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (ARRAY, (7, 16)),
        (ARRAY | {"SLURM_ARRAY_TASK_MIN": "0"}, (8, 16)),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "8"}, (4, 8)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}, (3, 4)),
    ],
)
def test_a_batch_system_says_which_shard(environment, expected):
    shard = Shard.of("auto", environment)
    assert shard == expected
    assert [window for window in range(40) if shard.takes(window)] == list(
        range(shard.number - 1, 40, shard.total)
    )
