"""Embedding files: what goes in comes out, at any width, and names never leave them."""

import json
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import random_esm2, random_stages
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_torch
from rd_torch import store as face
from rd_torch.cluster import require_parts
from rd_torch.embedding import embed_to_store
from rd_torch.sequences import Protein
from rd_torch.store import FORMATS, Facts, Names, format_of, load_format, open_store
from rd_torch.store.hdf5 import chunk_columns
from rd_torch.store.naming import dataset_name, file_name, identifier_of
from rd_torch.store.parquet import Parquet, ParquetStore
from rd_torch.store.windows import Record, gather

SEQUENCES = ["MKTAYIAKQR", "M", "GGGSXBUZO" * 30, "MLLAVLYCLLWSFQTSA", "MKV"]
PROTEINS = [Protein(f"sp|P{i}/x", sequence) for i, sequence in enumerate(SEQUENCES)]
MINI_ADDED = {"28K": 32, "90K": 16, "207K": 16, "1M": 64}
IDENTIFIERS = [protein.identifier for protein in PROTEINS]
NASTY = ["a/b", "a%2Fb", "..", ".", "../../up", "/etc/passwd", "a b", "x" * 10_000, "x" * 10_001, "ü" * 300]
NASTY += ["a\\b", "~", "-rf", "#", "a#2", "NUL", "con.pt", ".hidden", "𓀀", "tab\there", "A/B", "*?", "", "%"]


@pytest.fixture(scope="module")
def mini():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini")


def stored(model, folder, suffix, proteins=PROTEINS, **options):
    path = folder / f"out.{suffix}"
    assert embed_to_store(model, proteins, path, **options) == {}
    assert [each.name for each in folder.iterdir()] == [path.name], "nothing is left beside the store"
    return open_store(path)


@pytest.mark.parametrize(
    ("suffix", "pool", "dtype"),
    [
        *(
            (suffix, pool, dtype)
            for suffix in ("h5", "pt")
            for pool in ("mean", "none")
            for dtype in ("float32", "float16")
        ),
        ("parquet", "mean", "float32"),
        ("parquet", "mean", "float16"),
        ("pt", "mean", "bfloat16"),
        ("pt", "none", "bfloat16"),
    ],
)
@pytest.mark.parametrize("width", [None, 40])
def test_what_is_embedded_is_read_in_order_at_any_width(mini, tmp_path, suffix, pool, dtype, width):
    expected = rd_torch.embed(mini, SEQUENCES, pool=pool, width=width)
    with stored(mini, tmp_path, suffix, pool=pool, save_dtype=dtype, width=width) as store:
        assert list(store) == IDENTIFIERS
        assert len(store) == len(SEQUENCES)
        assert (store.pool, store.width) == (pool, width or 128)
        for narrow in (1, 32, 33, store.width):
            for got, whole in zip(
                store.read(slice(None), width=narrow, as_torch=True), expected, strict=True
            ):
                assert got.dtype == getattr(torch, dtype)
                assert torch.equal(got, torch.from_numpy(whole).to(got.dtype)[..., :narrow])
        assert store.facts.width == store.width
        assert store.facts.added == ({"28K": 32, "90K": 8} if width else MINI_ADDED)


@pytest.mark.parametrize("suffix", ["h5", "parquet", "pt"])
def test_one_record_or_several_are_found_by_name_place_and_slice(mini, tmp_path, suffix):
    expected = rd_torch.embed(mini, SEQUENCES)
    with stored(mini, tmp_path, suffix) as store:
        assert np.array_equal(store["sp|P2/x"], expected[2])
        assert np.array_equal(store[3], expected[3])
        assert np.array_equal(store[-1], expected[-1])
        assert np.array_equal(store[1:4], expected[1:4])
        assert np.array_equal(store[::-2], expected[::-2])
        assert np.array_equal(store[["sp|P4/x", "sp|P0/x", "sp|P4/x"]], expected[[4, 0, 4]])
        assert store[5:].shape == store[[]].shape == (0, 128)
        assert "sp|P2/x" in store
        assert "P2" not in store
        assert 2 not in store
        with pytest.raises(KeyError, match="identifier that is in .*, got 'P2'"):
            store["P2"]
        for place in (5, -6):
            with pytest.raises(IndexError, match=f"a place below 5, got {place}"):
                store[place]
        for width in (0, 129):
            with pytest.raises(ValueError, match=f"width from 1 to 128, got {width}"):
                store.read(0, width=width)


def test_arrays_of_bfloat16_are_float32(mini, tmp_path):
    with stored(mini, tmp_path, "pt", save_dtype="bfloat16") as store:
        assert store[0].dtype == np.float32
        assert np.array_equal(store[0], store.read(0, as_torch=True).float().numpy())


def test_hdf5_is_laid_out_as_uniprot_does_it_and_says_what_it_is(mini, tmp_path):
    stored(mini, tmp_path, "h5", pool="none", width=48, save_dtype="float16", name="mini")
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file) == [f"sp|P{i}%2Fx" for i in range(len(SEQUENCES))]
        for i, sequence in enumerate(SEQUENCES):
            dataset = file[f"sp|P{i}%2Fx"]
            assert (dataset.shape, dataset.dtype) == ((len(sequence), 48), np.float16)
            assert dataset.chunks == (len(sequence), 16)
        assert list(file.attrs["levels"]) == ["28K", "90K"]
        assert list(file.attrs["widths"]) == [32, 48]
        assert (file.attrs["width"], file.attrs["pool"], file.attrs["model"]) == (48, "none", "mini")


def test_chunks_divide_the_levels_where_they_can():
    assert chunk_columns((320, 480, 640, 1280, 2560, 5120)) == 160
    assert chunk_columns((32, 48, 64, 128)) == 16
    assert chunk_columns((32, 50)) == 16
    assert chunk_columns((5,)) == 5


def test_parquet_has_a_column_for_what_each_level_adds_in_other_engines_too(mini, tmp_path):
    import duckdb
    import polars

    expected = rd_torch.embed(mini, SEQUENCES, tokens_per_batch=8)
    stored(mini, tmp_path, "parquet", tokens_per_batch=8)
    folder = tmp_path / "out.parquet"
    assert len(list(folder.iterdir())) == 2
    table = polars.read_parquet(folder)
    assert table.columns == ["identifier", "length", "28K", "90K", "207K", "1M"]
    assert table["identifier"].to_list() == IDENTIFIERS
    assert table["length"].to_list() == list(map(len, SEQUENCES))
    assert np.array_equal(
        np.concatenate([table["28K"].to_numpy(), table["90K"].to_numpy()], axis=1), expected[:, :48]
    )
    rows = duckdb.sql(f"SELECT \"1M\" FROM '{folder}/*.parquet' WHERE length = 17").fetchall()
    assert np.array_equal(np.array(rows[0][0], np.float32), expected[3, 64:])


@pytest.mark.parametrize(("pool", "key"), [("mean", "mean_representations"), ("none", "representations")])
def test_pt_files_are_what_code_for_fair_esms_extract_reads(mini, tmp_path, pool, key):
    stored(mini, tmp_path, "pt", [Protein("P1", "MKTAYI")], pool=pool, width=48)
    kept = torch.load(tmp_path / "out.pt" / "P1.pt", weights_only=True)
    assert kept["label"] == "P1"
    assert list(kept[key]) == [mini.truncate("90K").num_layers]
    assert kept[key][3].shape == ((48,) if pool == "mean" else (6, 48))
    assert kept[key][3].untyped_storage().nbytes() == kept[key][3].numel() * 4, (
        "nothing else is saved with it"
    )


def test_files_of_other_programs_are_read(tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    with h5py.File(tmp_path / "uniprot.h5", "w") as file:
        for name, row in zip(("P1", "a%20b"), rows, strict=True):
            file[name] = row
    (tmp_path / "extracted").mkdir()
    for name, row in zip(("P1", "P2 some text"), rows, strict=True):
        layers = {6: torch.zeros(7, 5), 33: torch.from_numpy(row)}
        torch.save({"label": name, "representations": layers}, tmp_path / "extracted" / f"{name}.pt")
    for name in ("uniprot.h5", "extracted"):
        with open_store(tmp_path / name) as store:
            assert store.facts is None
            assert (store.pool, store.width, len(store)) == ("none", 5, 2)
            assert np.array_equal(store["P1"], rows[0])
            assert np.array_equal(store.read(1, width=2), rows[1][:, :2])
            assert np.array_equal(store[list(store)[1]], rows[1])
            with pytest.raises(KeyError, match="got '.'"):
                store["."]


def test_what_is_no_store_is_refused(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="file or folder at .*gone.h5, got nothing there$"):
        open_store(tmp_path / "gone.h5")
    (tmp_path / "gone.h5.part").mkdir()
    with pytest.raises(FileNotFoundError, match="unfinished, run the same command again"):
        open_store(tmp_path / "gone.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(ValueError, match=r"expected an HDF5 file, got .*text\.h5, which cannot be read"):
        open_store(tmp_path / "text.h5")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("P1")
    with pytest.raises(
        ValueError, match="one dataset a protein, of floating-point numbers of 1 or 2 dimensions"
    ):
        open_store(tmp_path / "group.h5")
    with pytest.raises(ValueError, match=r"a folder of \.pt files, got none"):
        open_store(tmp_path / "gone.h5.part")
    torch.save({"other": 1}, tmp_path / "gone.h5.part" / "a.pt")
    with pytest.raises(ValueError, match="with representations or mean_representations"):
        open_store(tmp_path / "gone.h5.part")
    with pytest.raises(
        ValueError, match="ends in .h5, .parquet, .pt, or a format of h5, parquet, pt, got 'out.csv'"
    ):
        format_of("out.csv")


@pytest.mark.parametrize(
    ("suffix", "options", "message"),
    [
        (
            "h5",
            {"save_dtype": "bfloat16"},
            "save_dtype to be one of 'float32', 'float16' in .h5, got 'bfloat16'",
        ),
        ("parquet", {"save_dtype": "bfloat16"}, "'float32', 'float16' in .parquet, got 'bfloat16'"),
        (
            "parquet",
            {"pool": "none"},
            "'std', 'cls' in .parquet, got 'none'",
        ),
        ("pt", {"save_dtype": "float64"}, "'float32', 'float16', 'bfloat16' in .pt, got 'float64'"),
        ("h5", {"save_dtype": "sites"}, "save_dtype to be one of 'float32', 'float16' in .h5, got 'sites'"),
        ("h5", {"pool": "median"}, "one or several of 'mean', 'max', 'std', 'cls'.*got 'median'"),
        ("h5", {"width": 129}, "width from 1 to 128"),
        ("h5", {"width": 0}, "width from 1 to 128"),
        ("h5", {"tokens_per_batch": 0}, "tokens_per_batch of at least 1, got 0"),
    ],
)
def test_what_a_format_does_not_take_is_refused_before_any_work(mini, tmp_path, suffix, options, message):
    with pytest.raises(ValueError, match=message):
        embed_to_store(mini, PROTEINS, tmp_path / f"out.{suffix}", **options)
    assert not (tmp_path / f"out.{suffix}").exists()


def test_no_protein_and_no_folder_are_refused(mini, tmp_path):
    with pytest.raises(ValueError, match="at least one protein to embed, got none"):
        embed_to_store(mini, [], tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="a folder .*missing to write to, got nothing"):
        embed_to_store(mini, PROTEINS, tmp_path / "missing" / "out.h5")


@pytest.mark.parametrize("suffix", ["h5", "parquet", "pt"])
def test_records_with_nasty_names_stay_inside_and_apart(mini, tmp_path, suffix):
    folder = tmp_path / "inside"
    folder.mkdir()
    proteins = [Protein(name, "MK" + "A" * i) for i, name in enumerate(NASTY)]
    with pytest.warns(UserWarning, match="an earlier record has") if suffix == "pt" else nullcontext():
        embed_to_store(mini, proteins, folder / f"out.{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in folder.iterdir()] == [f"out.{suffix}"]
    expected = rd_torch.embed(mini, [protein.sequence for protein in proteins])
    with open_store(folder / f"out.{suffix}") as store:
        np.testing.assert_allclose(store[:], expected, atol=2e-5)
        for name, vector in zip(NASTY, expected, strict=True):
            name = (
                "A/B#2" if suffix == "pt" and name == "A/B" else name
            )  # "a/b" in a file system without cases
            np.testing.assert_allclose(store[name], vector, atol=2e-5)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=30), unique=True, max_size=30))
def test_names_of_datasets_and_files_differ_where_identifiers_do(identifiers):
    for name in (dataset_name, file_name):
        assert len({name(each) for each in identifiers}) == len(identifiers)
        assert all(identifier_of(name(each)) == each for each in identifiers)
    for each in identifiers:
        assert "/" not in dataset_name(each) + file_name(each)
        assert dataset_name(each) != "."
        assert not file_name(each).startswith(".")


def test_long_names_are_cut_and_stay_different():
    for name, longest in ((dataset_name, 32_000), (file_name, 200)):
        for letter in ("x", "ü"):
            names = {name(letter * longest), name(letter * longest + "y"), name(letter * longest + "z")}
            assert len(names) == 3
            assert all(len(each.encode()) <= longest for each in names)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#2#2", "A"]), max_size=30))
def test_every_record_gets_a_name_of_its_own_and_the_first_keeps_its_own(identifiers):
    names = Names(str)
    given_ = [names.take(each) for each in identifiers]
    assert len(set(given_)) == len(given_)
    for place, (identifier, name) in enumerate(zip(identifiers, given_, strict=True)):
        assert re.fullmatch(re.escape(identifier) + r"(#\d+)?", name)
        if identifier not in identifiers[:place] and identifier not in given_[:place]:
            assert name == identifier
    assert names.renamed == sum(map(str.__ne__, identifiers, given_))


def test_repeated_identifiers_are_numbered_and_equal_sequences_embedded_each(mini, tmp_path):
    proteins = [Protein("P1", "MKT"), Protein("P2", "MKTA"), Protein("P1", "MKTAY"), Protein("P3", "MKT")]
    with pytest.warns(UserWarning, match="stored as IDENTIFIER#2 and so on: 1"):
        embed_to_store(mini, proteins, tmp_path / "out.h5")
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["P1", "P2", "P1#2", "P3"]
        np.testing.assert_allclose(store[:], rd_torch.embed(mini, ["MKT", "MKTA", "MKTAY", "MKT"]), atol=2e-5)


def test_facts_of_later_versions_are_read(mini, tmp_path):
    facts = stored(mini, tmp_path, "h5").facts
    text = json.dumps(json.loads(facts.to_json()) | {"later": 1})
    assert type(facts).from_json(text) == facts


READING = """
import sys
from pathlib import Path
from rd_torch.store import open_store

def counted(width):
    with open_store(sys.argv[1]) as store:
        before = int(Path("/proc/self/io").read_text().split()[1])
        store.read(slice(None), width=width)
        return int(Path("/proc/self/io").read_text().split()[1]) - before

counted(128)
print(counted(32), counted(128))
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted by Linux")
@pytest.mark.parametrize(("suffix", "pool"), [("h5", "none"), ("parquet", "mean")])
def test_a_quarter_of_the_width_reads_at_most_two_fifths_of_the_bytes(tmp_path, suffix, pool):
    widths = {"28K": 32, "90K": 48, "207K": 64, "1M": 128}
    backbones = {name: random_esm2(1, width, 4) for name, width in widths.items()}
    model = rd_torch.RDModel(backbones, random_stages(widths=widths)).eval()
    longest = 40 if pool == "none" else 1
    proteins = [Protein(f"P{i}", "MKTAYIAKQR" * (1 + i % longest)) for i in range(120)]
    stored(model, tmp_path, suffix, proteins, pool=pool, tokens_per_batch=1000)
    output = subprocess.run(
        [sys.executable, "-c", READING, tmp_path / f"out.{suffix}"],
        capture_output=True,
        text=True,
        check=True,
    )
    narrow, whole = map(int, output.stdout.split())
    residues = sum(len(protein.sequence) for protein in proteins) if pool == "none" else len(proteins)
    assert whole >= residues * 128 * 4
    assert narrow <= 0.4 * whole


def test_every_name_of_the_face_loads_and_unknown_ones_do_not():
    assert set(face.__all__) == set(face._HOMES)
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        face.nothing  # noqa: B018  # the access is the test


def test_formats_are_listed_without_torch_and_loaded_one_by_one():
    code = """
import sys
from rd_torch.store import FORMATS, Failure, format_of
print(*FORMATS, *sorted({"torch", "pyarrow", "h5py"} & set(sys.modules)))
format_of("out.pt")
print(*sorted({"torch", "pyarrow", "h5py"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "h5 parquet pt\ntorch\n"
    assert [load_format(name).name for name in FORMATS] == list(FORMATS)


class Fourth(Parquet):
    """A format that somebody adds."""

    name = "fourth"

    @staticmethod
    def claims(path):
        return path.suffix == ".fourth"


@pytest.fixture
def fourth(monkeypatch):
    """Its line in the list, before those of formats that claim any file or folder."""
    monkeypatch.setitem(sys.modules, "rd_torch.store.fourth", sys.modules[__name__])
    before = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({"fourth": ("fourth", "Fourth"), **before})
    yield
    FORMATS.clear()
    FORMATS.update(before)


@pytest.mark.usefixtures("fourth")
def test_a_format_is_a_file_of_its_own_and_a_line_in_the_list(mini, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(Fourth, "open", lambda _, path: opened.append(path) or ParquetStore(path))
    with stored(mini, tmp_path, "fourth") as store:
        assert list(store) == IDENTIFIERS
    assert opened == [tmp_path / "out.fourth"]
    with pytest.raises(ValueError, match="ends in .fourth, .h5, .parquet, .pt, or a format of fourth, h5, "):
        format_of("out.csv")
    assert require_parts(tmp_path / "out.fourth", None, "mean").name == "fourth"
    with pytest.raises(ValueError, match="expected .fourth or .parquet or .pt, and pooling, on a cluster"):
        require_parts(tmp_path / "out.h5", None, "mean")


@pytest.mark.parametrize("name", ["s.h5", "s.parquet", "s.pt"])
def test_a_store_knows_every_shorter_chain_that_gives_its_first_features(mini, tmp_path, name):
    embed_to_store(mini, [("one", "MKVAQ")], tmp_path / name, width=64)
    with open_store(tmp_path / name) as store:
        assert store.facts.levels == ("28K", "90K", "207K")
        assert store.facts.level_fingerprints == tuple(
            rd_torch.RDModel.from_pretrained("esm2-rd-mini", level=level).fingerprint()
            for level in store.facts.levels
        )


def test_a_store_that_was_begun_before_levels_had_fingerprints_goes_on(tmp_path):
    facts = Facts("m", "f", ("a",), (4,), 1, "mean", "float32", "float32", 100, level_fingerprints=("g",))
    stated = json.loads(facts.to_json())
    del stated["level_fingerprints"]
    older = Facts.from_json(json.dumps(stated))
    assert older.level_fingerprints == ()
    facts.require_same(older, tmp_path)


def test_a_store_of_more_files_than_a_process_may_open_is_read(tmp_path):
    facts = Facts("m", "f", ("a", "b"), (2, 4), 1, "mean", "float32", "float32", 100)
    (tmp_path / "s.parquet").mkdir()
    records = [Record(f"p{n}", "M", 1, 1, [b"M"], ("", n)) for n in range(300)]
    for window in gather(records, 1, Names(str)):
        Parquet().write(tmp_path / "s.parquet", window, [(0, torch.full((4,), float(window.number)))], facts)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        with open_store(tmp_path / "s.parquet") as store:
            assert store.identifiers == [f"p{n}" for n in range(300)]
            assert store.read(slice(None))[:, 3].tolist() == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
