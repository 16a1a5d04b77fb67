"""Whatever interrupts it, a store ends up the same, and little is embedded twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_esm2, random_sequence, random_stages
from processes import begun

import rd_torch
from rd_torch import disk, embedder, hardware
from rd_torch.embedding import embed_to_store
from rd_torch.reading import Fasta
from rd_torch.sequences import Entry, Protein, cut_batches
from rd_torch.store import Names, cut_windows, load_format, open_store
from rd_torch.store.folder import Folder
from rd_torch.store.work import Work

BUDGET = 20
PROTEINS = [Protein(f"P{i}", random_sequence(5 + 7 * i % 31, i)) for i in range(120)]
BATCHES_OF_A_WINDOW = max(
    sum(1 for _ in cut_batches(window.contents, BUDGET))
    for window in cut_windows(starmap(Entry, PROTEINS), BUDGET, Names(str))
)
SUFFIXES = ["h5", "parquet", "pt"]


def chain():
    """Two random levels of one layer: what takes time here is to be the store."""
    backbones = {"28K": random_esm2(1, 32, 4), "90K": random_esm2(1, 48, 4)}
    return rd_torch.RDModel(backbones, random_stages(widths={"28K": 32, "90K": 48})).eval()


@pytest.fixture(scope="module")
def mini():
    return chain()


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """The store of all proteins by its suffix, written without an interruption."""
    folder = tmp_path_factory.mktemp("whole")

    def written(suffix):
        path = folder / f"whole.{suffix}"
        if not path.exists():
            embed(mini, path)
        return path

    return written


@pytest.fixture
def passes(monkeypatch):
    """The sequences of every forward pass."""
    seen = []
    pooled = embedder._pool
    monkeypatch.setattr(
        embedder,
        "_pool",
        lambda rows, residues, pool: seen.append(len(residues)) or pooled(rows, residues, pool),
    )
    return seen


def embed(model, path, proteins=PROTEINS, **options):
    return embed_to_store(
        model, proteins, path, **{"tokens_per_batch": BUDGET, "pool": pool_of(path), **options}
    )


def pool_of(path):
    return "mean" if path.suffix == ".parquet" else "none"


def same(one, two):
    with open_store(one) as first, open_store(two) as second:
        return (
            list(first) == list(second)
            and first.facts == second.facts
            and first.checksum == second.checksum
            and all(map(np.array_equal, first[:], second[:]))
        )


class Kill(BaseException):
    """Stands for whatever ends a run."""


def interrupt(model, path, windows, **options):
    """Embeds until so many windows are written."""
    write = Folder.write
    left = [windows]

    def counting(work, *arguments, **how):
        if not left[0]:
            raise Kill
        left[0] -= 1
        write(work, *arguments, **how)

    Folder.write = counting
    try:
        with pytest.raises(Kill):
            embed(model, path, **options)
    finally:
        Folder.write = write


KILLING = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import rd_torch
    from rd_torch import embedder
    sys.path.insert(0, sys.argv[2])
    from test_resume import PROTEINS, chain, embed, same

    folder = Path(sys.argv[1])
    model = chain().truncate("28K")
    pooled = embedder._pool

    def counted(rows, residues, pool):
        with (folder / "passes").open("a") as log:
            log.write("x")
        return pooled(rows, residues, pool)

    embedder._pool = counted

    def run(path, least=None, seconds=0):
        # A child of its own, killed so many seconds after so many passes; how long it took.
        start = time.perf_counter()
        child = os.fork()
        if not child:
            try:
                embed(model, path)
            finally:
                os._exit(0)
        if least is not None:
            while count() < least:  # a machine that is busy starts slowly, and then goes on at once
                time.sleep(0.001)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return time.perf_counter() - start

    def count():
        log = folder / "passes"
        return len(log.read_text()) if log.exists() else 0

    def passes():
        done = count()
        (folder / "passes").unlink(missing_ok=True)
        return done

    rng = random.Random(0)
    whole, seconds, needed = {}, {}, {}
    for suffix in ("h5", "parquet", "pt"):
        embed(model, folder / f"first.{suffix}")  # with what is imported then, which no child is to wait for
        passes()
        whole[suffix] = folder / f"whole.{suffix}"
        seconds[suffix] = run(whole[suffix])
        needed[suffix] = passes()
    results = []
    for trial in range(20):
        suffix = ("h5", "parquet", "pt")[trial % 3]
        path = folder / f"{trial}.{suffix}"
        run(path, rng.randrange(needed[suffix]), rng.uniform(0, 2) * seconds[suffix] / needed[suffix])
        done = len(list(Path(f"{path}.part").glob("windows/*.json")))
        run(path)
        left = [each.name for each in folder.glob(f"{trial}.*")]
        equal, twice = same(path, whole[suffix]), passes() - needed[suffix]
        results.append([equal, twice, done, left == [path.name]])
    print(json.dumps(results))
"""


def test_killed_at_twenty_random_moments_it_ends_the_same_and_embeds_one_window_twice_at_most(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLING), tmp_path, Path(__file__).parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert output.returncode == 0, output.stderr
    results = json.loads(output.stdout)
    assert len(results) == 20
    for equal, twice, _, clean in results:
        assert equal
        assert 0 <= twice <= BATCHES_OF_A_WINDOW
        assert clean
    assert len({done for _, _, done, _ in results}) > 5, "kills came at different stages"


@pytest.mark.slow
def test_killed_every_five_seconds_the_command_still_finishes(tmp_path, data):
    """A life is longer on a machine that does not finish a window in five seconds."""
    output = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "rd_torch.cli", "embed", data / "natural50_valid.fasta.xz", "-o", output]
    command += ["--tokens-per-batch", "1024", "--level", "90K"]

    def windows():
        return len(list(tmp_path.glob("out.parquet.part/windows/*.json")))

    kills = 0
    while not output.exists():
        before, start = windows(), time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if time.monotonic() - start > 5 and windows() > before:
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.1)
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills > 2
    with open_store(output) as store:
        assert list(store) == [protein.identifier for protein in Fasta(data / "natural50_valid.fasta.xz")]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("windows", [0, 1, 3])
def test_what_is_done_is_not_embedded_again(mini, tmp_path, passes, suffix, windows):
    embed(mini, tmp_path / f"whole.{suffix}")
    needed = sum(passes)
    passes.clear()
    interrupt(mini, tmp_path / f"out.{suffix}", windows)
    assert not (tmp_path / f"out.{suffix}").exists()
    said = [json.loads(each.read_text()) for each in (tmp_path / f"out.{suffix}.part" / "windows").iterdir()]
    assert len(said) == windows
    passes.clear()
    embed(mini, tmp_path / f"out.{suffix}")
    assert sum(passes) == needed - sum(len(each["names"]) for each in said)
    assert same(tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_finished_store_is_left_as_it_is(mini, tmp_path, passes, suffix):
    path = tmp_path / f"out.{suffix}"
    embed(mini, path)
    before = [(each, each.stat().st_mtime_ns) for each in sorted(tmp_path.rglob("*"))]
    passes.clear()
    embed(mini, path)
    assert not passes
    assert [(each, each.stat().st_mtime_ns) for each in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "mean"}, "expected pool none .*with which .* was begun, got mean"),
        ({"width": 33}, r"expected widths \(32, 48\) .*got \(32, 33\)"),
        ({"width": 30}, r"expected levels \('28K', '90K'\) .*got \('28K',\)"),
        ({"save_dtype": "float16"}, "expected save_dtype float32 .*got float16"),
        (
            {"model": "bfloat16"},
            "expected backbone_dtype float32 .* was begun, got bfloat16 .* use what it was begun with",
        ),
        ({"model": "changed"}, "expected fingerprint "),
        ({"tokens_per_batch": 41}, "expected tokens_per_batch 20, .*got 41: leave it out"),
        ({"proteins": PROTEINS[::-1]}, "expected the sequences .*, got others"),
        (
            {"proteins": [Protein("Q", PROTEINS[0].sequence), *PROTEINS[1:]]},
            "expected the sequences .*, got others",
        ),
        ({"proteins": PROTEINS[:10]}, "expected the sequences .*, got"),
    ],
)
def test_a_store_of_something_else_is_refused_with_the_difference(
    mini, tmp_path, monkeypatch, whole, change, message, finished
):
    monkeypatch.setattr(hardware, "is_emulated", lambda *_: False)  # elsewhere a warning comes first
    path = tmp_path / "out.h5"
    if finished:
        embed(mini, path)
    else:
        interrupt(mini, path, 2)
    other = mini
    if "model" in change:
        other = chain()
        other.bfloat16() if change["model"] == "bfloat16" else other.stages["90K"].V[3, 4].add_(1e-3)
    options = {name: value for name, value in change.items() if name != "model"}
    with pytest.raises(ValueError, match=message):
        embed(other, path, **options)
    embed(mini, path)
    assert same(path, whole("h5")), "the refusal has changed nothing"


def test_records_that_were_added_are_refused_by_a_finished_store_and_embedded_by_an_unfinished_one(
    mini, tmp_path
):
    more = [*PROTEINS, Protein("more", "MK")]
    embed(mini, tmp_path / "finished.h5")
    with pytest.raises(ValueError, match="expected the sequences with which .* was made, got others"):
        embed(mini, tmp_path / "finished.h5", proteins=more)
    interrupt(mini, tmp_path / "out.h5", 2)
    embed(mini, tmp_path / "out.h5", proteins=more)
    embed(mini, tmp_path / "whole.h5", proteins=more)
    assert same(tmp_path / "out.h5", tmp_path / "whole.h5")


def test_the_budget_found_at_the_start_is_used_again(mini, tmp_path, monkeypatch, whole):
    interrupt(mini, tmp_path / "out.h5", 1)
    monkeypatch.setattr(rd_torch.embedding, "plan_batches", lambda *_: (9_999, torch.device("cpu")))
    embed(mini, tmp_path / "out.h5", tokens_per_batch=None)
    assert same(tmp_path / "out.h5", whole("h5"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["short", "gone"])
def test_a_file_that_a_crash_left_short_is_embedded_again_alone(
    mini, tmp_path, passes, whole, suffix, damage
):
    expected = whole(suffix)
    path = tmp_path / f"out.{suffix}"
    interrupt(mini, path, 3)
    said = json.loads((tmp_path / f"out.{suffix}.part" / "windows" / "000002.json").read_text())
    last = tmp_path / f"out.{suffix}.part" / "data" / next(reversed(said["files"]))
    if damage == "gone":
        last.unlink()
    else:
        os.truncate(last, last.stat().st_size // 2)
    done = [
        json.loads(each.read_text())["names"]
        for each in (tmp_path / f"out.{suffix}.part" / "windows").iterdir()
    ]
    passes.clear()
    embed(mini, path)
    assert sum(passes) == len(PROTEINS) - sum(map(len, done)) + len(said["names"])
    assert same(path, expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("at", [0, 3, 6, 9])
def test_a_write_that_fails_is_an_error_and_the_next_run_goes_on(
    mini, tmp_path, monkeypatch, whole, suffix, at
):
    expected, write_whole = whole(suffix), disk.write_whole
    calls = [0]

    def failing(path, write, **options):
        calls[0] += 1
        if calls[0] > at:
            write(path.with_name(f".{path.name}.part"))  # what was written until the disk was full
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, write, **options)

    with monkeypatch.context() as patched:
        for module in ("work", "folder", "hdf5", "parquet", "fairesm"):
            patched.setattr(f"rd_torch.store.{module}.write_whole", failing)
        with pytest.raises(OSError, match="No space left on device"):
            embed(mini, tmp_path / f"out.{suffix}")
    assert not (tmp_path / f"out.{suffix}").exists()
    embed(mini, tmp_path / f"out.{suffix}")
    assert same(tmp_path / f"out.{suffix}", expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(tmp_path, suffix):
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{each.identifier}\n{each.sequence}\n" for each in PROTEINS))
    path = tmp_path / f"out.{suffix}"
    command = ["embed", fasta, "-o", path, "--level", "28K", "--pool", pool_of(path)]
    command += ["--tokens-per-batch", BUDGET]

    def ended(largest_file):
        process = begun(command, tmp_path / "said", largest_file)
        process.join()
        return process.exitcode, (tmp_path / "said").read_text()

    status, said = ended({"h5": 30_000, "parquet": 4_000, "pt": 1_500}[suffix])
    assert status == 1, said
    assert said.splitlines()[-1].startswith("Error: "), said
    assert "Traceback" not in said
    assert not path.exists()
    status, said = ended(10**9)
    assert status == 0, said
    with open_store(path) as store:
        assert list(store) == [each.identifier for each in PROTEINS]


def test_two_processes_do_not_write_one_store(mini, tmp_path):
    embed(mini, tmp_path / "facts.h5")
    with open_store(tmp_path / "facts.h5") as store:
        facts = store.facts
    with (
        Work(tmp_path / "out.h5", load_format("h5"), facts),
        pytest.raises(BlockingIOError, match="to write .*out.h5 alone, got another process"),
    ):
        embed(mini, tmp_path / "out.h5")
    embed(mini, tmp_path / "out.h5")
    assert same(tmp_path / "out.h5", tmp_path / "facts.h5")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_takes_too_much_memory_is_listed_and_the_rest_goes_on(mini, tmp_path, monkeypatch, suffix):
    proteins = [*PROTEINS[:30], Protein("long", "M" * 300), *PROTEINS[30:60]]
    monkeypatch.setattr("rd_torch.hardware.free_bytes", lambda _: 1_000_000)
    path = tmp_path / f"out.{suffix}"
    failures = embed(mini, path, proteins)
    assert list(failures) == ["long"]
    with open_store(path) as store:
        assert list(store) == [each.identifier for each in proteins if each.identifier != "long"]
    header, line = (tmp_path / f"out.{suffix}.failed.tsv").read_text().splitlines()
    assert header.split("\t") == ["identifier", "residues", "reason", "file", "line"]
    assert line.split("\t")[:2] == ["long", "300"]
    assert "expected memory for one sequence of 300 residues" in line
    assert embed(mini, path, proteins) == failures, "they are said again when nothing is left to do"


def test_a_window_of_nothing_but_failures_is_no_obstacle(mini, tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.hardware.free_bytes", lambda _: 1)
    with pytest.warns(UserWarning, match="too many"):
        assert len(embed(mini, tmp_path / "out.parquet", PROTEINS[:50])) == 50
    with open_store(tmp_path / "out.parquet") as store:
        assert len(store) == 0


def test_the_command_says_by_its_status_that_proteins_are_missing(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from rd_torch.cli import main

    fasta = tmp_path / "in.fasta"
    fasta.write_text(">short\nMK\n>long\n" + "M" * 4000 + "\n")
    monkeypatch.setattr("rd_torch.hardware.free_bytes", lambda _: 10_000_000)
    arguments = ["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--level", "28K"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3, result.output
    assert f"Left out 1 of the proteins. {tmp_path / 'out.h5'}.failed.tsv lists them" in result.stderr
