import re
import shutil
import socket
from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import embed_alone, random_sequence, small_model

import rd_torch
from rd_torch import Nesting, RDModel, combine_stores, embed_to_store, open_store
from rd_torch.cli import main
from rd_torch.levels import Reference
from rd_torch.sequences import Protein
from rd_torch.weights import write_folder

PROTEINS = [Protein(f"sp|P{i}/x", random_sequence(3 + 7 * (i % 5), seed=i)) for i in range(12)]
MANY = [Protein(f"Q{i}", protein.sequence) for i, protein in enumerate(PROTEINS * 4)]
SEQUENCES = [protein.sequence for protein in PROTEINS]
NAMES = [protein.identifier for protein in PROTEINS]
raw_files = partial(embed_alone, proteins=PROTEINS)


@pytest.fixture(scope="module")
def mini():
    return RDModel.from_pretrained("esm2-rd-mini")


@pytest.fixture(scope="module")
def nesting():
    return Nesting.from_pretrained("esm2-rd-mini")


@pytest.fixture(scope="module")
def raw(mini, tmp_path_factory):
    """Files of means; not to be changed."""
    return raw_files(mini, tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def raw_residues(mini, tmp_path_factory):
    """Files residue by residue; not to be changed."""
    return raw_files(mini, tmp_path_factory.mktemp("residues"), pool="none")


def read(path, **options):
    with open_store(path) as store:
        assert list(store) == NAMES
        return store.read(slice(None), **options)


def assert_near(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(1, other.std()))


@pytest.fixture
def small_windows(monkeypatch):
    """About 20 vectors of the shipped family a window."""
    monkeypatch.setattr("rd_torch.raw_files.BATCH_BYTES", 10 * 4 * (32 + 48 + 64 + 128))
    monkeypatch.setattr("rd_torch.raw_files.BATCHES_PER_WINDOW", 2)


@pytest.mark.parametrize(
    ("suffix", "pool", "out"),
    [
        ("h5", "mean", "parquet"),
        ("h5", "none", "h5"),
        ("pt", "mean", "h5"),
        ("pt", "none", "pt"),
        ("parquet", "mean", "pt"),
    ],
)
def test_files_of_any_format_nest_to_what_the_model_embeds(mini, nesting, tmp_path, suffix, pool, out):
    paths = raw_files(mini, tmp_path / "raw", suffix, pool)
    combine_stores(nesting, paths, tmp_path / f"out.{out}")
    rows = read(tmp_path / f"out.{out}")
    assert_near(rows, rd_torch.embed(mini, SEQUENCES, pool=pool))
    with open_store(tmp_path / f"out.{out}") as store:
        assert (store.facts.levels, store.facts.widths) == (("28K", "90K", "207K", "1M"), (32, 48, 64, 128))
        assert (store.pool, store.facts.model, store.facts.num_layers) == (pool, "esm2-rd-mini", 6)
        assert store.facts.fingerprint == nesting.fingerprint() != mini.fingerprint()


@pytest.mark.parametrize("predict_from", ["nested", "previous"])
def test_what_the_maps_act_on_is_the_checkpoints(tmp_path, predict_from):
    model = small_model(predict_from)
    model.save_pretrained(tmp_path / "chain")
    paths = raw_files(model, tmp_path / "raw", pool="none")
    combine_stores(Nesting.from_pretrained(tmp_path / "chain"), paths, tmp_path / "out.h5")
    assert_near(read(tmp_path / "out.h5"), rd_torch.embed(model, SEQUENCES, pool="none"))


def test_files_of_other_programs_are_read(mini, nesting, raw, tmp_path):
    vectors = {level: dict(zip(NAMES, read(path), strict=True)) for level, path in raw.items()}
    with h5py.File(tmp_path / "28K.h5", "w") as file:
        for name in NAMES[::-1]:
            file[name.replace("/", "%2F")] = vectors["28K"][name].astype(np.float16)
    for name in NAMES:
        path = tmp_path / "90K" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"label": name, "mean_representations": {3: torch.tensor(vectors["90K"][name])}}, path)
    combine_stores(nesting, {"90K": tmp_path / "90K", "28K": tmp_path / "28K.h5"}, tmp_path / "out.h5")
    expected = mini.combine({level: torch.tensor(read(raw[level])) for level in ("28K", "90K")}).numpy()
    with open_store(tmp_path / "out.h5") as store:
        assert sorted(store) == sorted(NAMES)
        np.testing.assert_allclose(store[NAMES], expected, rtol=0, atol=5e-3)
        assert store.facts.backbone_dtype == "float16, float32"


def test_records_keep_the_first_files_order_and_parquet_its_lengths(mini, nesting, tmp_path):
    paths = raw_files(mini, tmp_path / "raw", "parquet")
    paths["90K"] = raw_files(mini, tmp_path / "back", "parquet", proteins=PROTEINS[::-1], tokens_per_batch=1)[
        "90K"
    ]
    assert len(list(paths["90K"].iterdir())) > 1
    combine_stores(nesting, paths, tmp_path / "out.parquet")
    assert_near(read(tmp_path / "out.parquet"), rd_torch.embed(mini, SEQUENCES))
    with open_store(tmp_path / "out.parquet") as store:
        assert store.lengths() == list(map(len, SEQUENCES))
        assert store.lengths(slice(1, None, 5)) == [len(SEQUENCES[1]), len(SEQUENCES[6]), len(SEQUENCES[11])]


def test_lengths_are_said_where_they_are_known(nesting, raw, raw_residues, tmp_path):
    with open_store(raw_residues["28K"]) as store:
        assert store.lengths(slice(2, 5)) == [len(sequence) for sequence in SEQUENCES[2:5]]
    combine_stores(nesting, raw, tmp_path / "out.parquet")
    with open_store(tmp_path / "out.parquet") as store, open_store(raw["28K"]) as means:
        assert store.lengths() == means.lengths() == list(map(len, SEQUENCES))
    put(tmp_path / "28K.h5", {"P1": np.zeros(32, np.float32)})  # another program's
    with open_store(tmp_path / "28K.h5") as store:
        assert store.lengths() == [None]


@pytest.mark.parametrize("width", [20, 32, 40, 48])
def test_a_width_needs_the_files_of_its_levels_alone(nesting, raw, tmp_path, width):
    combine_stores(nesting, raw, tmp_path / "all.h5")
    needed = {level: raw[level] for level in (["28K"] if width <= 32 else ["28K", "90K"])}
    combine_stores(nesting, needed, tmp_path / "cut.h5", width=width)
    assert np.array_equal(read(tmp_path / "cut.h5"), read(tmp_path / "all.h5", width=width))
    unread = raw | dict.fromkeys(raw.keys() - needed.keys(), tmp_path / "nowhere.h5")
    combine_stores(nesting, unread, tmp_path / "same.h5", width=width)
    assert np.array_equal(read(tmp_path / "same.h5"), read(tmp_path / "cut.h5"))


def test_levels_that_are_given_end_the_embedding(mini, nesting, raw, tmp_path):
    combine_stores(nesting, {level: raw[level] for level in ("90K", "28K")}, tmp_path / "out.h5")
    assert_near(read(tmp_path / "out.h5"), rd_torch.embed(mini, SEQUENCES, width=48))


def test_no_backbone_is_loaded_and_nobody_asked_for_one(mini, raw, tmp_path, monkeypatch):
    levels = [replace(level, reference=Reference("nobody/nothing", "0" * 40)) for level in mini.config.levels]
    maps = {level: dict(stage.named_buffers()) for level, stage in mini.stages.items()}
    write_folder(tmp_path / "chain", replace(mini.config, levels=tuple(levels)), maps, {}, "chain")
    assert not (tmp_path / "chain" / "backbones").exists()

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(rd_torch.ESM2, "__init__", refuse)
    combine_stores(Nesting.from_pretrained(tmp_path / "chain"), raw, tmp_path / "out.h5")
    monkeypatch.undo()
    assert_near(read(tmp_path / "out.h5"), rd_torch.embed(mini, SEQUENCES))


def test_the_baseline_is_one_level(tmp_path):
    naive = rd_torch.ConcatPCA(torch.zeros(32 + 48), torch.eye(80)[:, :48])
    model = RDModel({level: small_model().backbones[level] for level in "ab"}, [naive])
    model.save_pretrained(tmp_path / "naive")
    paths = raw_files(model, tmp_path / "raw")
    combine_stores(Nesting.from_pretrained(tmp_path / "naive"), paths, tmp_path / "out.h5")
    with open_store(tmp_path / "out.h5") as store:
        assert (store.facts.levels, store.facts.widths) == (("b",), (48,))
        assert_near(store[:], rd_torch.embed(model, SEQUENCES))


@pytest.mark.usefixtures("small_windows")
def test_memory_holds_windows_not_files(nesting, raw_residues, tmp_path, monkeypatch):
    """A batch has the rows it may have, and those of its last record, also in a window of many batches."""
    monkeypatch.setattr("rd_torch.raw_files.BATCHES_PER_WINDOW", 100)
    rows = []
    combine = Nesting.combine
    monkeypatch.setattr(
        Nesting, "combine", lambda self, raw: rows.append(len(raw["28K"])) or combine(self, raw)
    )
    combine_stores(nesting, raw_residues, tmp_path / "out.h5")
    assert sum(rows) == sum(map(len, SEQUENCES))
    assert max(rows) < 10 + max(map(len, SEQUENCES))
    assert len(rows) > 5


def broken_off(nesting, paths, output, after):
    """Combines until so many records are done."""
    done = []

    def stop(records, before):
        done.append(records)
        if sum(done) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine_stores(nesting, paths, output, progress=stop)
    assert not output.exists()


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_it_goes_on_where_it_was_broken_off(nesting, mini, tmp_path, pool):
    paths = raw_files(mini, tmp_path / "raw", pool=pool, proteins=MANY)
    combine_stores(nesting, paths, tmp_path / "whole.h5")
    broken_off(nesting, paths, tmp_path / "out.h5", 40)
    seen = []
    combine_stores(nesting, paths, tmp_path / "out.h5", progress=lambda *done: seen.append(done))
    assert sum(records for records, _ in seen) == 48
    assert 0 < sum(records for records, before in seen if before) <= 40
    with open_store(tmp_path / "out.h5") as store, open_store(tmp_path / "whole.h5") as whole:
        assert store.identifiers == whole.identifiers
        assert all(np.array_equal(store[name], whole[name]) for name in whole)
        assert store.checksum == whole.checksum
    written = (tmp_path / "out.h5").stat()
    combine_stores(nesting, paths, tmp_path / "out.h5", progress=lambda *done: seen.append(done))
    assert all(before for _, before in seen[-3:])
    assert (tmp_path / "out.h5").stat() == written


def altered(path, folder):
    """The same file but for one number of the first record."""
    folder.mkdir()
    shutil.copy(path, folder / path.name)
    with h5py.File(folder / path.name, "a") as file:
        next(iter(file.values()))[5] += 1
    return folder / path.name


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("finished", [False, True])
def test_going_on_with_other_inputs_or_maps_is_refused(nesting, mini, tmp_path, finished):
    paths = raw_files(mini, tmp_path / "raw", proteins=MANY)
    if finished:
        combine_stores(nesting, paths, tmp_path / "out.h5")
    else:
        broken_off(nesting, paths, tmp_path / "out.h5", 45)
    others = paths | {"90K": altered(paths["90K"], tmp_path / "altered")}
    with pytest.raises(ValueError, match="expected the embeddings .*, got others"):
        combine_stores(nesting, others, tmp_path / "out.h5")
    with pytest.raises(ValueError, match="expected levels .* with which .* was begun"):
        combine_stores(nesting, {"28K": paths["28K"]}, tmp_path / "out.h5")
    with pytest.raises(ValueError, match="expected save_dtype float32 .*, got float16"):
        combine_stores(nesting, paths, tmp_path / "out.h5", save_dtype="float16")


@pytest.mark.parametrize(
    ("levels", "width", "message"),
    [
        (["28K", "207K"], None, "first levels of 28K, 90K, 207K, 1M, got 28K, 207K"),
        (["90K"], None, "first levels of .*, got 90K"),
        ([], None, "got none"),
        (["28K", "3B"], None, "first levels of .*, got 28K, 3B"),
        (["28K"], 33, "first levels of .*, at least 28K, 90K for 33 features, got 28K"),
        (["28K", "3B"], 32, "first levels of .*, got 28K, 3B"),
        (["28K"], 129, "width from 1 to 128"),
    ],
)
def test_other_levels_are_refused_before_any_file_is_opened(nesting, tmp_path, levels, width, message):
    paths = dict.fromkeys(levels, tmp_path / "nowhere.h5")
    with pytest.raises(ValueError, match=message):
        combine_stores(nesting, paths, tmp_path / "out.h5", width=width)


def put(path, rows):
    with h5py.File(path, "w") as file:
        for name, row in rows.items():
            file[name] = row


A, B = np.zeros(32, np.float32), np.zeros(48, np.float32)
AA, BB = np.zeros((3, 32), np.float32), np.zeros((3, 48), np.float32)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"P1": B}, {"P1": B}, "width 32 at level 28K, got 48 in .*28K.h5: name each file by the level"),
        ({"P1": A, "P2": A}, {"P1": B}, "got 'P2' in .*28K.h5 but not in .*90K.h5 .1 in all.: embed these"),
        (
            {"P1": A},
            {"P1": B, "P3": B, "P2": B},
            "got 'P2' in .*90K.h5 but not in .*28K.h5 .2 in all.: embed",
        ),
        ({"P1": AA}, {"P1": B}, "one vector a residue in every file, .* got one vector a protein in .*90K"),
        ({"P1": AA}, {"P1": BB[:2]}, "residues of 'P1' in every file, got 3 in .*28K.* and 2 in .*90K"),
        (
            {"P1": A, "P2": B},
            {"P1": B, "P2": B},
            r"and one width, in .*28K.h5, got 'P2' of float32 \(48,\)",
        ),
        (
            {"P1": AA, "P2": A},
            {"P1": BB, "P2": BB},
            r"and one width, in .*28K.h5, got 'P2' of float32 \(32,\) beside others",
        ),
        ({"P1": A.astype(int)}, {"P1": B}, "of floating-point numbers .* in .*28K.h5, got 'P1' of int64"),
        ({}, {}, "one dataset a protein, .* in .*28K.h5, got none"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, first, second, message):
    for name, rows in (("28K", first), ("90K", second)):
        put(tmp_path / f"{name}.h5", rows)
    paths = [f"{name}={tmp_path / name}.h5" for name in ("28K", "90K")]
    result = CliRunner().invoke(main, ["combine", *paths, "-o", str(tmp_path / "out.h5")])
    assert result.exit_code == 1
    assert re.search(f"Error: expected .*{message}", result.stderr.splitlines()[-1])
    assert not (tmp_path / "out.h5").exists()


def test_nested_embeddings_are_not_taken_for_raw_ones(mini, nesting, raw, tmp_path):
    """Their widths are the same."""
    embed_to_store(mini, PROTEINS, tmp_path / "nested.h5", width=48)
    with pytest.raises(
        ValueError, match="raw embeddings of the 90K backbone in .*, got nested ones of levels 28K, 90K"
    ):
        combine_stores(nesting, raw | {"90K": tmp_path / "nested.h5"}, tmp_path / "out.h5")


def test_names_that_the_format_cannot_tell_apart_are_numbered(nesting, tmp_path):
    put(tmp_path / "28K.h5", {"p1": A, "P1": A + 1})
    with pytest.warns(UserWarning, match="an earlier record has in pt, stored as IDENTIFIER#2 and so on: 1"):
        combine_stores(nesting, {"28K": tmp_path / "28K.h5"}, tmp_path / "out.pt")
    with open_store(tmp_path / "out.pt") as store:
        assert store["P1"][0] == 1
        assert store["p1#2"][0] == 0


def test_the_command_writes_what_python_writes_and_goes_on(nesting, raw, tmp_path):
    combine_stores(nesting, {level: raw[level] for level in ("28K", "90K")}, tmp_path / "python.h5")
    paths = [f"{level}={path}" for level, path in raw.items()]
    options = ["--format", "pt", "--save-dtype", "bfloat16", "--width", "40", "-o", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(main, ["combine", *paths, *options])
        assert result.exit_code == 0, result.output
        assert (
            "Model esm2-rd-mini (the shipped family; --model names another), levels 28K, 90K" in result.stderr
        )
    expected = torch.from_numpy(read(tmp_path / "python.h5", width=40))
    assert torch.equal(read(tmp_path / "out", as_torch=True), expected.bfloat16())
    options = ["--level", "90K", "-o", str(tmp_path / "out.h5")]
    assert CliRunner().invoke(main, ["combine", *paths[:2], *options]).exit_code == 0
    assert np.array_equal(read(tmp_path / "out.h5"), read(tmp_path / "python.h5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("28K",), "expected files as LEVEL=FILE, each level once, got 28K"),
        (("28K=a", "28K=b"), "expected files as LEVEL=FILE, each level once, got 28K=a, 28K=b"),
        (("28K=gone.h5",), "expected an embedding file or folder at gone.h5, got nothing there"),
        (("28K=a", "--width", "3", "--level", "28K"), "expected --width or --level, got both"),
        (("28K=a", "--level", "9B"), "level to be one of '28K', '90K', '207K', '1M', got '9B'"),
        (
            ("28K=a", "--model", "nowhere"),
            "expected a checkpoint's folder, the name of a shipped checkpoint (esm2-rd-mini)",
        ),
        ((), "Missing argument 'LEVEL=FILE...'"),
    ],
)
def test_wrong_arguments_get_one_clear_line(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["combine", *arguments, "-o", str(tmp_path / "out.h5")])
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_are_refused(nesting, raw, raw_residues, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder .*no to write to"):
        combine_stores(nesting, raw, tmp_path / "no" / "out.h5")
    with pytest.raises(ValueError, match=r"'std', 'cls' in .parquet, got 'none'"):
        combine_stores(nesting, raw_residues, tmp_path / "out.parquet")
    shutil.copy(raw["28K"], tmp_path / "28K.h5")
    with pytest.raises(ValueError, match="expected levels"):
        combine_stores(nesting, raw | {"28K": tmp_path / "28K.h5"}, tmp_path / "28K.h5")
    assert np.array_equal(read(tmp_path / "28K.h5"), read(raw["28K"]))


def test_a_nesting_is_the_models_own_maps(mini, nesting):
    raw = {
        name: torch.randn(5, width)
        for name, width in zip(nesting.config.widths, (32, 48, 64, 128), strict=True)
    }
    assert torch.equal(nesting.combine(raw), mini.combine(raw))
    assert nesting.fingerprint() == Nesting(mini.config, mini.stages).fingerprint()
    shorter = nesting.until("90K")
    assert shorter.fingerprint() != nesting.fingerprint()
    assert torch.equal(shorter.combine({"28K": raw["28K"], "90K": raw["90K"]}), nesting.combine(raw)[:, :48])
