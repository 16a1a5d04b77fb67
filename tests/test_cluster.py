"""On a cluster: the same stores and models as locally, whoever dies."""

import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from itertools import starmap

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from esmc import small_esmc
from helpers import random_sequence
from pages import run_example

import rd_torch
from rd_torch import cluster, sums
from rd_torch.cli import main
from rd_torch.cluster import Records, Workers, jobs, steps
from rd_torch.embedding import embed_to_store
from rd_torch.letters import Corrections
from rd_torch.reading import Fasta
from rd_torch.sequences import Entry, normalize_entries, normalize_proteins
from rd_torch.store import Names, cut_windows, load_format, open_store
from rd_torch.store.folder import Folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:letters that are no residue"),
    pytest.mark.filterwarnings("ignore:records whose identifier an earlier record has"),
]

BUDGET = 8
ONE = Workers(count=1, num_cpus=0.5)
TWO = Workers(count=2, num_cpus=0.5)
ON_ONE = ("--cluster", "--workers", 1, "--worker-cpus", 0.5)
SEQUENCES = [random_sequence(5 + 7 * k % 61, k) for k in range(150)]


@pytest.fixture(scope="module", autouse=True)
def ray():
    """A cluster on this machine, whose workers find the package and the helpers where this process does."""
    ray = pytest.importorskip("ray")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker has
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default its workers wait for all other tests
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        cluster.join()
        yield ray
        ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mini():
    return load("cpu")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """Records of which two share an identifier and one has a letter that is no residue."""
    path = tmp_path_factory.mktemp("proteins") / "in.fasta"
    identifiers = ["twice" if k in (3, 140) else f"P{k}" for k in range(len(SEQUENCES))]
    text = [f">{name} x\n{sequence}\n" for name, sequence in zip(identifiers, SEQUENCES, strict=True)]
    path.write_text("".join(text) + ">odd\nMKJ\n")
    return path


def load(device):
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K", device=device)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def embed(fasta, output, *arguments):
    return run("embed", fasta, "-o", output, "--level", "28K", "--tokens-per-batch", BUDGET, *arguments)


def files(store):
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.fixture(scope="module")
def local(fasta, tmp_path_factory):
    """The finished stores of local runs, by format."""
    folder = tmp_path_factory.mktemp("local")
    for suffix in ("parquet", "pt"):
        assert embed(fasta, folder / f"out.{suffix}").exit_code == 0
    return {suffix: files(folder / f"out.{suffix}") for suffix in ("parquet", "pt")}


def begun_locally(model, fasta, path, windows):
    """Writes the first windows of a store, as a run that is killed then."""

    class Kill(BaseException):
        pass

    done = [0]

    def progress(residues, before):
        done[0] += residues
        if done[0] >= enough:
            raise Kill

    proteins = list(normalize_proteins(Fasta(fasta)))
    cut = list(cut_windows(starmap(Entry, proteins), BUDGET, Names(str)))
    assert len(cut) > windows + 1
    enough = 1 + sum(window.residues for window in cut[:windows])
    with pytest.raises(Kill):
        embed_to_store(model, proteins, path, name="esm2-rd-mini", tokens_per_batch=BUDGET, progress=progress)
    said = sorted(path.with_name(f"{path.name}.part").glob("windows/*.json"))
    assert len(said) == windows
    return len(cut), proteins


def test_a_store_of_the_cluster_is_the_local_one_to_the_byte(fasta, local, tmp_path):
    result = embed(fasta, tmp_path / "out.parquet", *ON_ONE)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out.parquet") == local["parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert "letters that are no residue, read as X: 1" in result.stderr
    assert "stored as IDENTIFIER#2 and so on: 1" in result.stderr
    names = list(open_store(tmp_path / "out.parquet"))
    assert names.index("twice#2") == 140
    assert "Wrote the embeddings to" in embed(fasta, tmp_path / "out.parquet", *ON_ONE).stderr, "done is done"


def test_long_proteins_in_windows_are_the_local_ones_to_the_byte(fasta, tmp_path):
    windows = ("--windows", "30,6")
    assert embed(fasta, tmp_path / "local.parquet", *windows).exit_code == 0
    result = embed(fasta, tmp_path / "out.parquet", *windows, *ON_ONE)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out.parquet") == files(tmp_path / "local.parquet")
    with open_store(tmp_path / "out.parquet") as store:
        assert store.facts.windows == (30, 6)
        assert len(store.windowed) == sum(len(sequence) > 30 for sequence in SEQUENCES)
    assert "expected windows" in refused(embed(fasta, tmp_path / "out.parquet", *ON_ONE))


@pytest.mark.parametrize("ways", ["max", "mean,cls"])
def test_ways_to_pool_are_the_local_ones_to_the_byte(fasta, tmp_path, ways):
    for name, where in (("local", ()), ("out", ON_ONE)):
        result = embed(fasta, tmp_path / f"{name}.parquet", "--pool", ways, *where)
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "out.parquet") == files(tmp_path / "local.parquet")
    with open_store(tmp_path / "out.parquet") as store:
        assert store.facts.pool == ways.replace(",", "+")


def test_models_of_transformers_give_the_local_stores_to_the_byte(tmp_path):
    """One of DNA, whose letters would be refused as those of proteins."""
    foreign = pytest.importorskip("foreign")
    tokenizer = foreign.bpe_tokenizer("ACGTN")
    foreign.bert(tmp_path / "model", vocab=len(tokenizer), tokenizer=tokenizer)
    rd_torch.RDModel.from_pretrained(f"hf:{tmp_path / 'model'}", "a").save_pretrained(tmp_path / "chain")
    genes = "".join(f">g{k}\n{'ACGTTGCAAGCTANCGU'[k % 5 :] * (1 + k % 7)}\n" for k in range(30))
    (tmp_path / "genes.fasta").write_text(genes)
    for name, where in (("local", ()), ("out", ON_ONE)):
        output = tmp_path / f"{name}.parquet"
        result = run("embed", tmp_path / "genes.fasta", "-o", output, "--model", tmp_path / "chain", *where)
        assert result.exit_code == 0, result.output
        backbone = f"a=hf:{tmp_path / 'model'}"
        result = run("fit", tmp_path / "genes.fasta", "-o", tmp_path / name, "--backbone", backbone, *where)
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "out.parquet") == files(tmp_path / "local.parquet")
    local, ours = (rd_torch.RDModel.from_pretrained(tmp_path / name).config for name in ("local", "out"))
    assert ours.provenance["fit"] == local.provenance["fit"]


def test_the_cluster_finishes_what_a_local_run_has_begun(mini, fasta, local, tmp_path):
    out = tmp_path / "out.parquet"
    windows, _ = begun_locally(mini, fasta, out, 2)
    heard = Heard()
    cluster.embed_to_store(mini, load, Records(fasta), out, **options(heard))
    assert files(out) == local["parquet"]
    assert [before for _, before in heard].count(True) == 2
    assert len(heard) == windows
    assert heard.read == sum(residues for residues, _ in heard) == sum(map(len, SEQUENCES)) + 3
    assert heard.fraction == 1


def options(progress=None):
    chosen = {"workers": ONE, "name": "esm2-rd-mini", "tokens_per_batch": BUDGET}
    return chosen | ({"progress": progress} if progress is not None else {})


class Heard(list):
    """Keeps what it hears."""

    def __call__(self, residues, before=False):
        self.append((residues, before))

    def reach(self, residues, fraction):
        self.read, self.fraction = residues, fraction


def dying(marks, when):
    """Loads a model in workers that die in the middle of a window, `when(marks)` says so."""

    def loading(device):
        from rd_torch.store.folder import Folder

        write = Folder.write

        def watched(folder, window, rows, failures, **how):
            write(folder, window, until_death(window, rows), failures, **how)
            (marks / f"{os.getpid()}.wrote").touch()

        def until_death(window, rows):
            for place, row in enumerate(rows):
                if place == 2 and when(marks):
                    (marks / "killed").write_text(f"{window.number} {os.getpid()}")
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row

        Folder.write = watched
        return rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K", device=device)

    return loading


def once_when_two_have_written(marks):
    if not (marks / f"{os.getpid()}.wrote").exists() or (marks / "killed").exists():
        return False
    for _ in range(600):
        if len(list(marks.glob("*.wrote"))) == 2:
            return True
        time.sleep(0.1)
    raise AssertionError("only one worker has written")


def test_a_worker_killed_in_a_window_is_replaced_and_each_record_is_there_once(mini, fasta, local, tmp_path):
    out, heard = tmp_path / "out.pt", Heard()
    (tmp_path / "marks").mkdir()
    loading = dying(tmp_path / "marks", once_when_two_have_written)
    assert (
        cluster.embed_to_store(mini, loading, Records(fasta), out, **options(heard) | {"workers": TWO}) == {}
    )
    number, pid = (tmp_path / "marks" / "killed").read_text().split()
    assert (tmp_path / "marks" / f"{pid}.wrote").exists(), "it had written a window before"
    assert heard.read == sum(residues for residues, _ in heard), f"each window came once, {number} too"
    assert files(out) == local["pt"]
    names = list(open_store(out))
    assert len(names) == len(set(names)) == len(SEQUENCES) + 1
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "marks"}


def test_a_window_that_kills_every_worker_ends_the_run_and_the_next_one_goes_on(
    mini, fasta, local, tmp_path, monkeypatch
):
    out, heard = tmp_path / "out.parquet", Heard()
    monkeypatch.setattr(jobs, "MOST_DEATHS", 0)
    loading = dying(tmp_path, lambda marks: len(list(marks.glob("*.wrote"))) >= 1)
    with pytest.raises(
        OSError, match=r"workers that live, got 1 that died of the [\d]+ records from P\d+ on"
    ):
        cluster.embed_to_store(mini, loading, Records(fasta), out, **options())
    assert not out.exists()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.parquet.part/data/*")}
    assert done
    shutil.copytree(tmp_path / "out.parquet.part", tmp_path / "here.parquet.part")
    cluster.embed_to_store(mini, load, Records(fasta), out, **options(heard))
    assert [before for _, before in heard].count(True) == len(done)
    for path, modified in done.items():
        assert (out / path.name).stat().st_mtime_ns == modified, "what is done is not written again"
    assert files(out) == local["parquet"]
    result = embed(fasta, tmp_path / "here.parquet")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "here.parquet") == local["parquet"], "a local run goes on as well"


def test_other_sequences_and_other_models_are_refused(mini, fasta, tmp_path):
    out = tmp_path / "out.parquet"
    begun_locally(mini, fasta, out, 2)
    other = tmp_path / "other.fasta"
    other.write_text(fasta.read_text().replace(">P1 ", ">Q1 "))
    error = refused(embed(other, out, *ON_ONE))
    assert f"Error: expected the sequences with which {out} was begun, got others in the " in error

    folder = Folder.open(out, load_format("parquet"))
    limits = steps.Limits(is_budget_free=True, most_deaths=0)
    with pytest.raises(ValueError, match="expected the model esm2-rd-mini on all machines, got another one"):
        steps.begin_embedding(partial(steps.load_model, "esm2-rd-mini"), "cpu", folder, limits)
    with pytest.raises(FileNotFoundError, match="on a file system that all machines see, got nothing there"):
        Folder.open(tmp_path / "elsewhere.parquet", load_format("parquet"))


def refused(result):
    """What is said in one line, behind warnings."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("out.h5", ON_ONE, "expected .parquet or .pt, and pooling, on a cluster, got .h5 and --pool mean"),
        ("out.pt", (*ON_ONE, "--pool", "none"), "pooling, on a cluster, got .pt and --pool none"),
        ("out.pt", ("--workers", 2), "expected --cluster with --workers, --worker-cpus and --worker-gpus"),
        (
            "out.pt",
            ("--cluster", "--device", "cpu"),
            "--device or --cluster, got both: to compute on CPUs, give --worker-gpus 0",
        ),
        ("out.pt", ("--cluster", "--worker-cpus", 99), "a machine with 99 CPUs and 0 GPUs for a worker"),
    ],
)
def test_wrong_options_get_one_clear_line(fasta, tmp_path, output, arguments, message):
    assert message in refused(embed(fasta, tmp_path / output, *arguments))
    assert not (tmp_path / output).exists()


def test_records_are_read_as_locally(fasta):
    with pytest.raises(ValueError, match="got 'J' at position 3, in record odd"):
        list(Records(fasta, strict=True).windows(BUDGET, Names(str)))
    (*_, (window, known)) = Records(fasta, max_length=9).windows(BUDGET, Names(str))
    assert max(map(len, window.contents)) == 9
    cut = sum(len(sequence) > 9 for sequence in SEQUENCES)
    assert known["fraction"] == 1
    assert known["corrections"] == [0, 1, cut, 0]
    assert known["left_out"] == "[]"
    entries = normalize_entries(Fasta(fasta).entries(), Corrections())
    ours = [each for each, _ in Records(fasta).windows(BUDGET, Names(str))]
    assert ours == list(cut_windows(entries, BUDGET, Names(str)))


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch, ray):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(
            ConnectionError, match=f"HOST:PORT of a Ray cluster, got '{address}', where nothing"
        ):
            cluster.join(address)


def test_without_ray_the_error_says_what_to_install(fasta, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused(embed(fasta, tmp_path / "out.parquet", "--cluster"))
    assert error.startswith("Error: expected the package ray, got none")
    assert error.endswith("pip install rd_torch[cluster]")


def test_what_cannot_be_embedded_is_listed_and_the_status_says_so(mini, tmp_path, monkeypatch):
    fasta, out = tmp_path / "in.fasta", tmp_path / "out.parquet"
    fasta.write_text("".join(f">P{k}\n{random_sequence(5 + k, k)}\n" for k in range(40)))

    def forgetful(device):
        from rd_torch.model import RDModel

        model = RDModel.from_pretrained("esm2-rd-mini", level="28K", device=device)
        encode = model.encode

        def limited(tokens, **arguments):
            if tokens.shape[1] > 40 + 2:
                raise MemoryError("no room")
            return encode(tokens, **arguments)

        model.encode = limited
        return model

    failures = cluster.embed_to_store(mini, forgetful, Records(fasta), out, **options())
    assert sorted(failures) == ["P36", "P37", "P38", "P39"]
    lines = (tmp_path / "out.parquet.failed.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[:2] for line in lines[1:]) == [
        [f"P{k}", str(5 + k)] for k in range(36, 40)
    ]
    monkeypatch.setattr(cluster, "embed_to_store", lambda *_, **__: failures)
    result = embed(fasta, tmp_path / "other.parquet", *ON_ONE)
    assert result.exit_code == 3
    assert "Left out 4 of the proteins." in result.stderr


def test_a_dataset_gets_a_column_for_what_each_level_adds(ray):
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K")
    rows = [{"id": k, "letters": sequence, "label": k / 2} for k, sequence in enumerate(SEQUENCES[:30])]
    expected = rd_torch.embed(model, [row["letters"] for row in rows], width=40)
    dataset = ray.data.from_items(rows, override_num_blocks=2)
    embedded = cluster.embed_dataset(dataset, model, column="letters", workers=ONE, width=40)
    found = sorted(embedded.take_all(), key=lambda row: row["id"])
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert all(set(row) == {*rows[0], "28K", "90K"} for row in found)
    vectors = np.array([[*row["28K"], *row["90K"]] for row in found], np.float32)
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


def test_columns_that_cannot_be_are_refused():
    step = steps.begin_adding_columns(load, "cpu", "sequence", {})
    with pytest.raises(ValueError, match="expected a column 'sequence', got id, letters"):
        step(pa.table({"id": [1], "letters": ["MKV"]}))
    with pytest.raises(ValueError, match="expected no column '28K' yet, got one: rename it"):
        step(pa.table({"sequence": ["MKV"], "28K": [0]}))
    with pytest.raises(ValueError, match="expected a sequence, got none, in record number 2"):
        step(pa.table({"sequence": ["MKV", None]}))


def test_a_fit_on_the_cluster_is_the_local_one(fasta, tmp_path, monkeypatch):
    seen, solve = [], sums.solve_chain

    def watched(moments, *arguments, **options):
        seen.append(moments.parts)
        return solve(moments, *arguments, **options)

    monkeypatch.setattr(sums, "solve_chain", watched)
    arguments = ("--levels", "28K,90K", "--tokens-per-batch", BUDGET, "--regressor", "ridge", "--alpha", 2)
    arguments += ("--scale", "block", "--centre")
    for name, more in (("local", ()), ("cluster", ON_ONE)):
        result = run("fit", fasta, "-o", tmp_path / name, *arguments, *more)
        assert result.exit_code == 0, result.output
        assert "letters that are no residue, read as X: 1" in result.stderr
        assert "IDENTIFIER#2" not in result.stderr
    (count, mean, scatter), (other_count, other_mean, other_scatter) = seen
    assert count == other_count == sum(map(len, SEQUENCES)) + 3
    torch.testing.assert_close(other_mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other_scatter, scatter, rtol=1e-9, atol=1e-9 * float(scatter.abs().max()))
    here, there = (rd_torch.RDModel.from_pretrained(tmp_path / name) for name in ("local", "cluster"))
    for name, tensor in here.stages.named_buffers():
        torch.testing.assert_close(there.stages.get_buffer(name), tensor, rtol=1e-6, atol=1e-7)
    assert (
        there.config.basis == here.config.basis == {"scale": "block", "centre": True, "rotate_first": False}
    )
    row = torch.ones(40)
    expected, r2 = here.reconstruct(row, "90K")
    torch.testing.assert_close(there.reconstruct(row, "90K").embedding, expected, rtol=1e-4, atol=1e-4)
    assert there.reconstruct(row, "90K").r2 == pytest.approx(r2, abs=1e-6)
    assert there.config.provenance == here.config.provenance
    assert there.config.provenance["fit"]["sequences"] == len(SEQUENCES) + 1


def test_layers_are_chosen_and_embedded_on_the_cluster_as_locally(fasta, tmp_path):
    arguments = ("--levels", "28K,90K", "--choose-layers", "added", "--no-final-norm", "--added", 16)
    for name, more in (("local", ()), ("cluster", ON_ONE)):
        result = run("fit", fasta, "-o", tmp_path / name, *arguments, "--tokens-per-batch", BUDGET, *more)
        assert result.exit_code == 0, result.output
    here, there = (rd_torch.RDModel.from_pretrained(tmp_path / name) for name in ("local", "cluster"))
    assert there.config.widths == here.config.widths
    assert not there.config.final_norm
    scores = [each.config.provenance["fit"]["layers"]["scores"] for each in (here, there)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert set(scores[0]) == {"28K@1", "28K", "90K@1", "90K@2", "90K"}
    for name, tensor in here.stages.named_buffers():
        torch.testing.assert_close(there.stages.get_buffer(name), tensor, rtol=1e-6, atol=1e-7)
    cut = tmp_path / "28K@1.parquet"
    result = run("embed", fasta, "-o", cut, "--model", "esm2-rd-mini", "--level", "28K@1", *ON_ONE)
    assert result.exit_code in {0, 3}, result.output
    with rd_torch.open_store(cut) as store:
        assert (store.layer, store.facts.final_norm) == (1, True)


@pytest.fixture(scope="module")
def esmc(tmp_path_factory):
    """A chain of ESM-C as a checkpoint."""
    folder = tmp_path_factory.mktemp("esmc") / "chain"
    small_esmc().save_pretrained(folder)
    return folder


def test_a_chain_of_esmc_embeds_on_the_cluster_as_locally(esmc, fasta, tmp_path):
    command = ("embed", fasta, "--model", esmc, "--tokens-per-batch", BUDGET)
    for name, where in (("local", ()), ("out", ON_ONE)):
        result = run(*command, "-o", tmp_path / f"{name}.parquet", *where)
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "out.parquet") == files(tmp_path / "local.parquet")


def test_backbones_of_esmc_are_fitted_on_the_cluster_as_locally(esmc, fasta, tmp_path):
    command = ("fit", fasta, "--backbones", esmc, "--tokens-per-batch", BUDGET, "--regressor", "ols")
    for name, where in (("local", ()), ("cluster", ON_ONE)):
        result = run(*command, "-o", tmp_path / name, *where)
        assert result.exit_code == 0, result.output
    here, there = (rd_torch.RDModel.from_pretrained(tmp_path / name) for name in ("local", "cluster"))
    assert [level.family for level in there.config.levels] == ["esmc"] * 3
    assert there.config.provenance == here.config.provenance
    for (name, tensor), (_, other) in zip(
        here.stages.named_buffers(), there.stages.named_buffers(), strict=True
    ):
        torch.testing.assert_close(other, tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("here_first", [True, False])
def test_a_fit_that_was_killed_here_or_there_is_finished_on_the_other_side(
    here_first, fasta, tmp_path, monkeypatch
):
    monkeypatch.setattr(sums, "SECONDS_BETWEEN_SAVES", 0)
    model, whole = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K"), sum(map(len, SEQUENCES)) + 3

    def backbones(device):
        return dict(model.backbones.items())

    class Watching(jobs._Quiet):
        """Progress that counts, and ends a fit when some residues are in."""

        def __init__(self, enough):
            self.seen, self.enough = {True: 0, False: 0}, enough

        def __call__(self, residues, before=False):
            self.seen[before] += residues
            if self.seen[False] > self.enough:
                raise KeyboardInterrupt

    def here(watching):
        sequences = (protein.sequence for protein in Fasta(fasta))
        return rd_torch.fit(
            backbones("cpu"), sequences, tokens_per_batch=16, work_folder=tmp_path / "work", progress=watching
        )

    def there(watching):
        return cluster.fit(
            backbones,
            Records(fasta),
            tokens_per_batch=16,
            workers=ONE,
            work_folder=tmp_path / "work",
            progress=watching,
        )

    first, second = (here, there) if here_first else (there, here)
    with pytest.raises(KeyboardInterrupt):
        first(Watching(whole / 2))
    watching = Watching(whole)
    got = second(watching)
    assert watching.seen[True] > whole / 4
    assert sum(watching.seen.values()) == whole
    expected = rd_torch.fit(backbones("cpu"), [*SEQUENCES, "MKJ"], tokens_per_batch=16)
    assert got.config.provenance == expected.config.provenance
    for name, tensor in expected.stages["90K"].named_buffers():
        torch.testing.assert_close(got.stages["90K"].get_buffer(name), tensor, rtol=1e-5, atol=1e-6)


def test_a_dataset_fits_a_chain(ray):
    family = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K")
    dataset = ray.data.from_items([{"sequence": sequence} for sequence in SEQUENCES], override_num_blocks=3)
    model = cluster.fit_dataset(dataset, family, workers=ONE, regressor="ols", provenance={"from": "tests"})
    expected = rd_torch.fit(family.backbones, SEQUENCES, regressor="ols")
    for level, stage in model.stages.items():
        assert stage.explained.r2 == pytest.approx(expected.stages[level].explained.r2, abs=1e-4)
    assert model.config.provenance["fit"] == expected.config.provenance["fit"]
    assert model.config.provenance["from"] == "tests"
    with pytest.raises(ValueError, match="expected regressor to be one of"):
        cluster.fit_dataset(dataset, family, regressor="lasso")


def test_workers_fill_the_machines_there_are(monkeypatch, ray):
    def placed(machines, **given):
        nodes = [{"Alive": True, "Resources": resources} for resources in machines]
        monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
        workers = Workers(**given).placed()
        return workers.count, workers.num_cpus, workers.num_gpus, workers.device

    assert placed([{"CPU": 16.0}, {"CPU": 24.0}]) == (5, 8, 0, "cpu")
    assert placed([{"CPU": 16.0}, {"CPU": 4.0}]) == (5, 4, 0, "cpu")
    assert placed([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}]) == (4, 1, 1, "cuda")
    assert placed([{"CPU": 16.0, "GPU": 4.0}], num_gpus=0.5) == (8, 1, 0.5, "cuda")
    assert placed([{"CPU": 16.0, "GPU": 4.0}], num_gpus=0, num_cpus=2) == (8, 2, 0, "cpu")
    assert placed([{"CPU": 1.0}], count=3, num_gpus=1) == (3, 1, 1, "cuda"), "machines may be yet to come"


def test_the_example_of_the_reference_runs():
    run_example("cluster")
