"""Search: exact scans against a formula, two stages against one, labels, resumes, wrong inputs."""

import csv
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from helpers import embed_alone

import rd_torch
from rd_torch.cli import main
from rd_torch.disk import take_lock
from rd_torch.searching import (
    Hit,
    Labels,
    add_to_index,
    building,
    open_index,
    read_labels,
    search,
    search_to_file,
    transfer_labels,
)
from rd_torch.searching.reliability import Reliability
from rd_torch.sequences import Protein

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(count, seed, length=30):
    rng = random.Random(seed)
    return [
        (f"p{seed}_{n}", "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(8, length))))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini", device="cpu")


@pytest.fixture(scope="module")
def proteins():
    return draw(150, 0)


@pytest.fixture(scope="module")
def store(model, proteins, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "proteins.parquet"
    rd_torch.embed_to_store(model, proteins, path, name="esm2-rd-mini")
    return path


@pytest.fixture(scope="module")
def index(model, store):
    with rd_torch.build_index(store, store.parent / "proteins.index") as opened:
        yield opened


def cosines(queries, targets):
    """The definition, in float64."""
    mean = targets.astype(np.float64).mean(0)
    one, other = (each - mean for each in (queries.astype(np.float64), targets.astype(np.float64)))
    return (one @ other.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)


def by_query(found):
    grouped = {}
    for each in found:
        grouped.setdefault(each.query, []).append(each)
    return grouped


@pytest.mark.parametrize("first_only", [True, False])
@pytest.mark.parametrize("width", [None, 20, 48])
def test_hits_are_those_of_the_formula(model, proteins, store, tmp_path, width, first_only):
    queries = draw(20, 1)
    compared = (width or 32) if first_only else 128
    expected = cosines(
        *(rd_torch.embed(model, [s for _, s in each], width=compared) for each in (queries, proteins))
    )
    with rd_torch.build_index([store], tmp_path / "i.index", width=width) as opened:
        found = by_query(search(model, queries, opened, k=7, candidates=150, first_stage_only=first_only))
    assert list(found) == [name for name, _ in queries]
    for (name, sequence), row in zip(queries, expected, strict=True):
        hits = found[name]
        order = np.argsort(-row)[:7]
        assert [hit.target for hit in hits] == [proteins[place][0] for place in order]
        assert [hit.similarity for hit in hits] == pytest.approx(row[order], abs=2e-6)
        assert [hit.rank for hit in hits] == list(range(1, 8))
        assert {hit.query_length for hit in hits} == {len(sequence)}


def test_the_second_stage_sees_what_the_first_hands_on(model, proteins, index):
    queries = draw(10, 2)
    first = by_query(search(model, queries, index, k=25, candidates=25, first_stage_only=True))
    second = by_query(search(model, queries, index, k=25, candidates=25))
    whole = by_query(search(model, queries, index, k=25, candidates=150))
    assert first != second
    for name, _ in queries:
        assert {hit.target for hit in first[name]} == {hit.target for hit in second[name]}
        assert [hit.first_similarity for hit in first[name]] == [hit.similarity for hit in first[name]]
        by_target = {hit.target: hit.similarity for hit in whole[name]}
        for hit in second[name]:
            assert hit.similarity == pytest.approx(by_target.get(hit.target, hit.similarity), abs=1e-6)


def test_a_protein_finds_itself_first_and_hits_do_not_depend_on_other_queries(model, proteins, index):
    together = list(search(model, proteins[:12], index, k=3))
    alone = [hit for protein in proteins[:12] for hit in search(model, [protein], index, k=3)]
    for one, other in zip(together, alone, strict=True):
        assert one[:3] == other[:3]
        assert one.similarity == pytest.approx(other.similarity, abs=1e-5)
    assert [hit.target for hit in together[::3]] == [name for name, _ in proteins[:12]]
    assert [hit.similarity for hit in together[::3]] == pytest.approx(np.ones(12), abs=1e-5)


@pytest.mark.filterwarnings("ignore:similarities are taken from the mean")
def test_a_store_with_fewer_proteins_gives_fewer_hits(model, tmp_path):
    rd_torch.embed_to_store(model, draw(4, 3), tmp_path / "few.h5")
    with rd_torch.build_index(tmp_path / "few.h5", tmp_path / "few.index") as opened:
        hits = list(search(model, draw(2, 4), opened, k=10))
    assert [hit.rank for hit in hits] == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("form", ["h5", "parquet", "pt"])
def test_every_format_and_number_type_is_searched(model, proteins, tmp_path, form, dtype):
    rd_torch.embed_to_store(model, proteins[:30], tmp_path / f"s.{form}", save_dtype=dtype)
    with rd_torch.build_index(tmp_path / f"s.{form}", tmp_path / "s.index") as opened:
        names = opened.identifiers
        hits = list(search(model, proteins[:5], opened, k=1))
    assert [hit.target for hit in hits] == names[:5]
    assert [hit.similarity for hit in hits] == pytest.approx(np.ones(5), abs=1e-3)


def test_the_first_stage_alone_takes_a_part_of_the_model_and_runs_no_larger_backbone(model, index):
    small = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K", device="cpu")
    queries = draw(5, 5)
    whole = list(search(model, queries, index, first_stage_only=True))
    assert list(search(small, queries, index, first_stage_only=True)) == whole
    with pytest.raises(
        ValueError, match="expected the model that made the stores, esm2-rd-mini, with levels"
    ):
        list(search(small, queries, index))
    ran = []
    hooks = [
        backbone.register_forward_hook(lambda *_, level=level: ran.append(level))
        for level, backbone in model.backbones.items()
    ]
    list(search(model, queries, index, first_stage_only=True))
    assert set(ran) <= {"28K"}
    for hook in hooks:
        hook.remove()


def test_another_model_and_a_part_that_does_not_suffice_are_refused(model, store, tmp_path):
    other = rd_torch.RDModel.from_pretrained("esm2-rd-mini", device="cpu")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    queries = draw(1, 6)
    with rd_torch.build_index(store, tmp_path / "i.index", width=40) as opened:
        for each, first_only in ((other, False), (other, True), (model.truncate("28K"), True)):
            with pytest.raises(ValueError, match="got another one, or a part of it"):
                list(search(each, queries, opened, first_stage_only=first_only))
        found = [
            list(search(model.truncate(level), queries, opened, first_stage_only=True))
            for level in ("90K", "207K", "1M")
        ]
    assert found[0] == found[1] == found[2]


def test_a_store_of_a_part_of_a_model_is_searched_by_that_part_and_by_the_whole(model, proteins, tmp_path):
    rd_torch.embed_to_store(model, proteins, tmp_path / "narrow.h5", width=64)
    with rd_torch.build_index(tmp_path / "narrow.h5", tmp_path / "i.index") as opened:
        hits = list(search(model, proteins[:5], opened, k=2))
        assert list(search(model.truncate("207K"), proteins[:5], opened, k=2)) == hits
        with pytest.raises(ValueError, match="got another one, or a part of it"):
            list(search(model.truncate("90K"), proteins[:5], opened))
    assert [hit.target for hit in hits[::2]] == [name for name, _ in proteins[:5]]


def test_a_store_that_was_combined_from_raw_embeddings_is_searched(model, proteins, tmp_path):
    raw = embed_alone(model, tmp_path, proteins=[Protein(*each) for each in proteins[:40]])
    rd_torch.combine_stores(rd_torch.Nesting.from_pretrained("esm2-rd-mini"), raw, tmp_path / "c.parquet")
    with rd_torch.build_index(tmp_path / "c.parquet", tmp_path / "i.index") as opened:
        hits = list(search(model, proteins[:5], opened, k=1))
        with pytest.raises(ValueError, match="got another one, or a part of it"):
            list(search(model.truncate("28K"), proteins[:5], opened, first_stage_only=True))
    assert [hit.target for hit in hits] == [name for name, _ in proteins[:5]]
    assert [hit.similarity for hit in hits] == pytest.approx(np.ones(5), abs=1e-5)


def test_an_index_states_the_recall_of_its_first_stage(model, store, tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.searching.recall.CANDIDATES", 12)
    monkeypatch.setattr("rd_torch.searching.index.ROWS_READ", 17)
    found = {}
    for width in (4, 32, 128):
        with rd_torch.build_index(store, tmp_path / f"{width}.index", width=width) as opened:
            found[width] = opened.config.recall
    with rd_torch.open_store(store) as opened:
        vectors = opened.read(slice(None)).astype(np.float64)
    shares = []
    by_four, by_all = (cosines(vectors[:, :width], vectors[:, :width]) for width in (4, 128))
    for n in range(150):
        some, all_ = ([each for each in np.argsort(-row[n]) if each != n] for row in (by_four, by_all))
        shares.append(len(set(some[:12]) & set(all_[:10])) / 10)
    assert found[4] == pytest.approx(np.mean(shares))
    assert found[4] < found[32] < found[128] == 1


def test_proteins_are_added_and_the_mean_stays(model, proteins, tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.h5"
    rd_torch.embed_to_store(model, proteins[:100], one)
    rd_torch.embed_to_store(model, proteins[100:], two)
    rd_torch.build_index(one, tmp_path / "i.index").close()
    with open_index(tmp_path / "i.index") as before:
        old = list(search(model, proteins[:3], before, k=1))
        mean = before.mean.copy()
    with add_to_index(tmp_path / "i.index", two) as after:
        assert len(after) == 150
        assert after.identifiers == [name for name, _ in proteins]
        assert (after.mean == mean).all()
        assert list(search(model, proteins[:3], after, k=1)) == old
        vectors = rd_torch.embed(model, [sequence for _, sequence in proteins], width=32).astype(np.float64)
        units = vectors - mean[:32]
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        for hit in search(model, proteins[:1], after, k=150, first_stage_only=True):
            place = int(hit.target.split("_")[1])
            assert hit.similarity == pytest.approx(units[0] @ units[place], abs=2e-6)
        hits = list(search(model, proteins[98:103], after, k=1))
    assert [hit.target for hit in hits] == [name for name, _ in proteins[98:103]]
    assert after.config.recall == 1
    assert len(list((tmp_path / "i.index").glob("first-*"))) == 1
    with pytest.raises(ValueError, match="does not have yet, got 'p0_100'"):
        add_to_index(tmp_path / "i.index", two)


def test_an_approximate_index_finds_nearly_the_same(model, proteins, store, index, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MOST_EXACT", 100)
    monkeypatch.setattr(building, "CLUSTERS_BY_ROOT", 0.4)
    with rd_torch.build_index(store, tmp_path / "i.index") as opened:
        assert not opened.config.is_exact
        found = list(search(model, draw(10, 7), opened, k=5))
    assert [hit[:3] for hit in found] == [hit[:3] for hit in search(model, draw(10, 7), index, k=5)]


def test_among_few_proteins_of_an_approximate_index_none_is_missed(model, store, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MOST_EXACT", 100)
    monkeypatch.setattr("rd_torch.searching.index.CLUSTERS_SCANNED", 1)
    few = np.arange(0, 150, 10)
    with rd_torch.build_index(store, tmp_path / "i.index") as opened, rd_torch.open_store(store) as vectors:
        queries = vectors.read(slice(0, 20), width=32)
        _, whole = opened.first(queries, 150)
        _, found = opened.first(queries, 15, few)
    assert (whole < 0).any()
    assert (np.sort(found, axis=1) == few).all()


def test_index_and_store_move_together_and_a_changed_store_is_refused(model, proteins, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    rd_torch.embed_to_store(model, proteins[:30], home / "s.parquet")
    rd_torch.build_index(home / "s.parquet", home / "s.index").close()
    home.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    with open_index(moved / "s.index") as opened:
        assert len(opened) == 30
    (moved / "s.parquet").rename(moved / "gone.parquet")
    with pytest.raises(FileNotFoundError, match="move it back, or index it anew"):
        open_index(moved / "s.index")
    rd_torch.embed_to_store(model, proteins[5:35], moved / "s.parquet")
    with pytest.raises(ValueError, match="to have the records that"):
        open_index(moved / "s.index")


def rewrite(path, change):
    """Change the vectors in the first file of a Parquet store, and nothing else."""
    part = next(iter(sorted(path.glob("part-*.parquet"))))
    table = pq.read_table(part)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    pq.write_table(pa.table(change(columns)).replace_schema_metadata(table.schema.metadata), part)


def test_vectors_that_changed_in_a_store_of_the_same_records_are_refused(model, proteins, tmp_path):
    rd_torch.embed_to_store(model, proteins[:40], tmp_path / "s.parquet")
    rd_torch.build_index(tmp_path / "s.parquet", tmp_path / "s.index").close()

    def nudge(columns):
        values = columns["1M"].flatten().to_numpy().copy()
        values[7 * 64 + 3] = np.nextafter(values[7 * 64 + 3], np.float32(np.inf))
        return columns | {"1M": pa.FixedSizeListArray.from_arrays(pa.array(values), 64)}

    rewrite(tmp_path / "s.parquet", nudge)
    with open_index(tmp_path / "s.index") as opened:
        assert list(search(model, proteins[:1], opened, k=1, candidates=1))
        with pytest.raises(ValueError, match="got another one for 'p0_7': index it anew"):
            list(search(model, proteins[:1], opened, candidates=40))


def test_identifiers_that_repeat_in_one_store_are_refused(model, proteins, tmp_path):
    rd_torch.embed_to_store(model, proteins[:40], tmp_path / "s.parquet")
    twice = pa.array(["p0_0", "p0_1", "p0_1", *(name for name, _ in proteins[3:40])])
    rewrite(tmp_path / "s.parquet", lambda columns: columns | {"identifier": twice})
    with pytest.raises(ValueError, match="expected each identifier once, got 'p0_1' several times"):
        rd_torch.build_index(tmp_path / "s.parquet", tmp_path / "s.index")


@pytest.mark.parametrize("count", [1, 5])
def test_proteins_of_one_vector_are_refused(model, tmp_path, count):
    rd_torch.embed_to_store(model, [(f"p{n}", "MKVAQ") for n in range(count)], tmp_path / "s.h5")
    with pytest.raises(ValueError, match=f"proteins whose vectors differ, got one vector for all of {count}"):
        rd_torch.build_index(tmp_path / "s.h5", tmp_path / "s.index")
    assert not (tmp_path / "s.index").exists()


def test_a_mean_of_few_proteins_is_warned_of(model, tmp_path):
    rd_torch.embed_to_store(model, draw(19, 3), tmp_path / "few.h5")
    with pytest.warns(UserWarning, match="little known from 19: index 20 or more"):
        rd_torch.build_index(tmp_path / "few.h5", tmp_path / "few.index")
    said = run_cli("index", str(tmp_path / "few.h5"), "-o", str(tmp_path / "again.index"))
    assert "little known from 19: index 20 or more" in said


def test_an_index_is_whole_or_not_there(model, store, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(building, "_write", die)
        with pytest.raises(Killed):
            rd_torch.build_index(store, tmp_path / "i.index")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "i.index.part").mkdir()
    (tmp_path / "i.index.part" / "checks-000007.npy").touch()  # of a run that was killed
    with rd_torch.build_index(store, tmp_path / "i.index") as opened:
        assert len(opened) == 150
    assert [each.name for each in tmp_path.iterdir()] == ["i.index"]
    assert not (tmp_path / "i.index" / "checks-000007.npy").exists()
    with take_lock(tmp_path / "i.index", tmp_path), pytest.raises(BlockingIOError, match="another process"):
        add_to_index(tmp_path / "i.index", store)


def test_files_of_an_index_that_belong_to_another_are_refused(model, proteins, store, tmp_path):
    rd_torch.embed_to_store(model, proteins[:40], tmp_path / "s.parquet")
    rd_torch.build_index(tmp_path / "s.parquet", tmp_path / "few.index").close()
    rd_torch.build_index(store, tmp_path / "all.index").close()
    for name, message in (("mean.npy", "the mean that"), ("first-000001.faiss", "expected vectors")):
        shutil.copytree(tmp_path / "all.index", tmp_path / f"{name}.index")
        shutil.copy(tmp_path / "few.index" / name, tmp_path / f"{name}.index" / name)
        with pytest.raises(ValueError, match=message):
            open_index(tmp_path / f"{name}.index")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "none"}, "expected a store of one vector for each protein, got a vector for each residue"),
        ({"pool": ["mean", "max"]}, "got vectors by mean\\+max"),
    ],
)
def test_stores_that_cannot_be_searched_are_refused(model, tmp_path, options, message):
    rd_torch.embed_to_store(model, draw(5, 8), tmp_path / "s.h5", **options)
    with pytest.raises(ValueError, match=message):
        rd_torch.build_index(tmp_path / "s.h5", tmp_path / "s.index")
    assert not (tmp_path / "s.index").exists()


def test_wrong_stores_widths_and_numbers_are_refused(model, store, index, tmp_path):
    for width in (0, 129):
        with pytest.raises(ValueError, match=f"expected a width from 1 to 128, got {width}"):
            rd_torch.build_index(store, tmp_path / "i.index", width=width)
    with pytest.raises(ValueError, match="expected a store to index, got none"):
        rd_torch.build_index([], tmp_path / "i.index")
    with pytest.raises(ValueError, match="expected each identifier once, got 'p0_0' several times"):
        rd_torch.build_index([store, store], tmp_path / "i.index")
    rd_torch.embed_to_store(model, draw(5, 9), tmp_path / "narrow.h5", width=64)
    with pytest.raises(ValueError, match="expected levels"):
        rd_torch.build_index([store, tmp_path / "narrow.h5"], tmp_path / "i.index")
    with pytest.raises(FileExistsError, match="expected nothing at"):
        rd_torch.build_index(store, index.path)
    for options, message in (
        ({"k": 0}, "expected k of at least 1, got 0"),
        ({"k": 400}, "expected candidates to be k, which is 400, or more, got 300"),
    ):
        with pytest.raises(ValueError, match=message):
            list(search(model, draw(1, 9), index, **options))
    assert len(list(search(model, draw(1, 9), index, k=400, first_stage_only=True))) == 150
    with pytest.raises(FileNotFoundError, match="expected an index at"):
        open_index(tmp_path / "nothing.index")
    with pytest.raises(ValueError, match="expected an index, a folder that rd-torch index wrote"):
        open_index(store)
    with pytest.raises(ValueError, match="expected letters.*in query"):
        list(search(model, [("bad", "M1")], index))


def test_nan_in_a_store_is_refused_by_name(model, tmp_path):
    import h5py

    rd_torch.embed_to_store(model, draw(5, 10), tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file["p10_3"][40] = np.nan
    with pytest.raises(ValueError, match="got NaN or infinity at 'p10_3'"):
        rd_torch.build_index(tmp_path / "s.h5", tmp_path / "s.index")
    assert [each.name for each in tmp_path.iterdir()] == ["s.h5"]


def lines_of(path):
    return list(csv.DictReader(path.open(newline=""), delimiter="\t"))


def test_a_table_goes_on_after_a_kill_and_is_the_same_to_the_byte(model, index, tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.searching.jobs.TOKENS_OF_A_WINDOW", 10)
    queries = [*draw(40, 11), ("bad", "M1"), *draw(10, 12)]
    failures = search_to_file(model, queries, index, tmp_path / "whole.tsv", k=3).failures
    assert list(failures) == ["bad"]
    assert "bad" in (tmp_path / "whole.tsv.failed.tsv").read_text()
    windows = []

    class Killed(BaseException):
        pass

    real = rd_torch.searching.Finder.hits

    def dying(self, window, reasons):
        windows.append(window.number)
        if window.number == 3 and windows.count(3) == 1:
            raise Killed
        return real(self, window, reasons)

    monkeypatch.setattr(rd_torch.searching.Finder, "hits", dying)
    with pytest.raises(Killed):
        search_to_file(model, queries, index, tmp_path / "cut.tsv", k=3)
    assert not (tmp_path / "cut.tsv").exists()
    with pytest.raises(ValueError, match="expected k 3, with which .* was begun, got 4"):
        search_to_file(model, queries, index, tmp_path / "cut.tsv", k=4)
    again = search_to_file(model, queries, index, tmp_path / "cut.tsv", k=3)
    assert (list(again.failures), again.threshold) == (["bad"], None)
    assert windows[:5] == [0, 1, 2, 3, 3]
    assert (tmp_path / "cut.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not (tmp_path / "cut.tsv.part").exists()
    listed = [(row["query"], row["target"], row["rank"]) for row in lines_of(tmp_path / "cut.tsv")]
    found = search(model, [each for each in queries if each[0] != "bad"], index, k=3)
    assert listed == [(hit.query, hit.target, str(hit.rank)) for hit in found]


def begin(model, queries, index, output, monkeypatch, **options):
    """Write a table until its first window is done."""
    real = rd_torch.searching.Finder.hits

    def dying(self, window, reasons):
        if window.number == 1:
            raise KeyboardInterrupt
        return real(self, window, reasons)

    with monkeypatch.context() as patched:
        patched.setattr("rd_torch.searching.jobs.TOKENS_OF_A_WINDOW", 10)
        patched.setattr(rd_torch.searching.Finder, "hits", dying)
        with pytest.raises(KeyboardInterrupt):
            search_to_file(model, queries, index, output, **options)


def test_a_table_goes_on_with_its_own_budget_whatever_memory_is_free(model, index, tmp_path, monkeypatch):
    queries, output = draw(40, 11), tmp_path / "hits.tsv"
    monkeypatch.setattr("rd_torch.batching.find_budget", lambda *_: 64)
    begin(model, queries, index, output, monkeypatch)
    monkeypatch.setattr("rd_torch.batching.find_budget", lambda *_: 4096)
    with pytest.raises(ValueError, match="expected tokens_per_batch 64, .* got 100"):
        search_to_file(model, queries, index, output, tokens_per_batch=100)
    asked = []
    real = rd_torch.searching.Finder.__init__
    monkeypatch.setattr(
        rd_torch.searching.Finder,
        "__init__",
        lambda self, *args, **options: (
            asked.append(options["tokens_per_batch"]),
            real(self, *args, **options),
        )[1],
    )
    search_to_file(model, queries, index, output)
    assert asked == [64]


def test_a_table_does_not_go_on_with_another_index(model, proteins, index, tmp_path, monkeypatch):
    queries, output = draw(40, 11), tmp_path / "hits.tsv"
    rd_torch.embed_to_store(model, proteins, tmp_path / "half.parquet", save_dtype="float16")
    begin(model, queries, index, output, monkeypatch)
    with (
        rd_torch.build_index(tmp_path / "half.parquet", tmp_path / "half.index") as other,
        pytest.raises(ValueError, match=f"expected index {index.config.identity}, .* choose another output"),
    ):
        search_to_file(model, queries, other, output)


def test_the_identity_of_an_index_is_that_of_all_it_depends_on_and_not_of_places(index):
    config, source = index.config, index.config.sources[0]
    moved = replace(config, sources=(replace(source, path="/elsewhere", beside="elsewhere"),))
    assert moved.identity == config.identity
    others = [replace(source, **{name: "other"}) for name in ("checksum", "vectors")]
    changed = [replace(config, sources=(other,)) for other in others]
    changed += [
        replace(config, first_width=7),
        replace(config, is_exact=False),
        replace(config, mean="other"),
    ]
    changed += [replace(config, facts=replace(config.facts, fingerprint="other"))]
    assert len({config.identity, *(each.identity for each in changed)}) == 7


def test_a_wrong_model_leaves_nothing_behind(model, index, tmp_path):
    with pytest.raises(ValueError, match="got another one, or a part of it"):
        search_to_file(model.truncate("28K"), draw(2, 1), index, tmp_path / "hits.tsv")
    assert list(tmp_path.iterdir()) == []


def test_queries_without_a_finite_embedding_and_of_one_name_are_said(model, index, tmp_path, monkeypatch):
    real = rd_torch.searching.finding.window_embedder

    def broken(*args):
        embed = real(*args)

        def embed_window(window, failures):
            for batch in embed(window, failures):
                yield [
                    (place, row * (np.nan if window.names[place] == "p1_1" else 1)) for place, row in batch
                ]

        return embed_window

    monkeypatch.setattr(rd_torch.searching.finding, "window_embedder", broken)
    queries = draw(3, 1)
    report = search_to_file(model, queries, index, tmp_path / "hits.tsv", k=1)
    assert list(report.failures) == ["p1_1"]
    assert "expected a finite embedding" in report.failures["p1_1"].reason
    assert [row["query"] for row in lines_of(tmp_path / "hits.tsv")] == ["p1_0", "p1_2"]
    with pytest.raises(ValueError, match="expected a finite embedding, .* in query p1_1"):
        list(search(model, queries, index))
    with pytest.warns(UserWarning, match="an earlier query has, listed as IDENTIFIER#2 and so on: 1"):
        names = [hit.query for hit in search(model, [("a", "MKV"), ("a", "MKVA")], index, k=1)]
    assert names == ["a", "a#2"]


def test_tables_have_the_columns_that_are_asked_for(model, index, tmp_path):
    queries = draw(3, 13)
    search_to_file(model, queries, index, tmp_path / "a.tsv", columns=("target", "query_length"), k=2)
    assert list(lines_of(tmp_path / "a.tsv")[0]) == ["target", "query_length"]
    search_to_file(model, queries, index, tmp_path / "a.jsonl", k=2)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for row, hit in zip(rows, search(model, queries, index, k=2), strict=True):
        assert (row["query"], row["target"], row["rank"]) == hit[:3]
        assert row["similarity"] == pytest.approx(hit.similarity, abs=1e-6)
    with pytest.raises(ValueError, match="expected an output that ends in .tsv or .jsonl"):
        search_to_file(model, queries, index, tmp_path / "a.csv")
    with pytest.raises(ValueError, match="expected at least one query, got none"):
        search_to_file(model, [], index, tmp_path / "b.tsv")


def mutate(sequence, rng, count):
    letters = list(sequence)
    for place in rng.sample(range(len(letters)), count):
        letters[place] = rng.choice("ACDEFGHIKLMNPQRSTVWY")
    return "".join(letters)


@pytest.fixture(scope="module")
def families(model, tmp_path_factory):
    """Twelve families of ten relatives each, and proteins of no family; the index, and labels."""
    rng, folder = random.Random(5), tmp_path_factory.mktemp("families")
    parents = [sequence for _, sequence in draw(12, 20, 80)]
    members = [(f"f{f}_{n}", mutate(parent, rng, 2)) for f, parent in enumerate(parents) for n in range(10)]
    rd_torch.embed_to_store(model, [*members, *draw(60, 21, 80)], folder / "s.parquet")
    labels = {name: frozenset([name.split("_")[0]]) for name, _ in members}
    with rd_torch.build_index(folder / "s.parquet", folder / "s.index") as opened:
        yield parents, opened, Labels(labels, "family")


def test_labels_of_planted_families_are_transferred_and_strangers_get_none(model, families):
    parents, index, labels = families
    rng = random.Random(6)
    relatives = [(f"q{f}", mutate(parent, rng, 3)) for f, parent in enumerate(parents)]
    found = by_query(transfer_labels(model, relatives, index, labels))
    for number in range(len(parents)):
        first = found[f"q{number}"][0]
        assert first.label == f"f{number}"
        assert first.reliability > 0.5
        assert first.target.startswith(f"f{number}_")
        assert first.support >= 2
    strangers = by_query(transfer_labels(model, draw(12, 22, 80), index, labels))
    assert sum(rows[0].label == "" for rows in strangers.values()) >= 11
    for rows in strangers.values():
        if rows[0].label == "":
            assert (len(rows), rows[0].support) == (1, 0)
            assert rows[0].reliability < 0.5


def test_stated_reliabilities_are_those_of_queries_half_of_which_have_a_relative():
    rng = np.random.default_rng(0)

    def draw_pairs():
        """Similarities to a protein's relatives and to strangers, nearest first."""
        pairs = [(each, True) for each in rng.normal(0.55, 0.2, 2)]
        pairs += [(each, False) for each in rng.normal(0.2, 0.15, 8)]
        return sorted(((float(min(each, 1)), shared) for each, shared in pairs), reverse=True)

    known = Reliability([draw_pairs() for _ in range(2_000)], 5)
    threshold = known.threshold(0.5)
    stated, right, given = [], [], []
    for has_relative in [True, False] * 4_000:
        pairs = [pair for pair in draw_pairs() if has_relative or not pair[1]]
        reliabilities = known.of(np.array([similarity for similarity, _ in pairs[:5]]))
        assert (np.diff(reliabilities) <= 0).all()
        stated.append(reliabilities[0])
        right.append(pairs[0][1])
        given.append(pairs[0][0] >= threshold)
    stated, right, given = map(np.array, (stated, right, given))
    for low in np.arange(0, 1, 0.2):
        inside = (stated >= low) & (stated < low + 0.2)
        assert stated[inside].mean() == pytest.approx(right[inside].mean(), abs=0.06)
    assert given[1::2].mean() == pytest.approx(known.strangers(threshold), abs=0.03)
    assert stated.max() < 1


def test_labels_that_all_share_are_refused(model, families):
    _, index, labels = families
    same = Labels(dict.fromkeys(labels.by_name, frozenset(["all"])), "family")
    with pytest.raises(ValueError, match="expected labels that some neighbours do not have in common"):
        list(transfer_labels(model, draw(1, 30), index, same))


def test_labels_of_unknown_proteins_are_said(model, families):
    _, index, labels = families
    more = Labels(dict(labels.by_name) | {"P1": frozenset(["x"])}, "family")
    with pytest.warns(UserWarning, match="such as 'P1', left out: 1"):
        list(transfer_labels(model, draw(1, 30), index, more))


def test_shuffled_labels_are_not_reliable(model, families):
    parents, index, labels = families
    names, values = list(labels.by_name), list(labels.by_name.values())
    random.Random(7).shuffle(values)
    shuffled = Labels(dict(zip(names, values, strict=True)), "family")
    found = list(transfer_labels(model, [("q", parents[0])], index, shuffled))
    assert [each.label for each in found] == [""]
    assert found[0].reliability < 0.3


def test_a_table_of_labels_is_read_and_wrong_ones_are_refused(model, index, tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_text("id\tfamily\nP1\ta\nP1\tb\nP2\t\nP3\ta\n")
    assert read_labels(path) == Labels({"P1": frozenset("ab"), "P3": frozenset("a")}, "family")
    path.write_text("id,x,family\nP1,1,a\n")
    assert read_labels(path, "family").by_name == {"P1": frozenset("a")}
    for text, column, message in (
        ("id,x,family\nP1,1,a\n", None, "name that of the labels with --label-column"),
        ("id,family\nP1,a\n", "clan", "expected a column 'clan' behind the first, got 'id', 'family'"),
        ("id,family\nP1,a,b\n", None, "expected 2 columns, as in the header row, got 3 .line 2"),
        ("id,family\nP1,\n", None, "expected labels in"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(path, column)
    with pytest.raises(FileNotFoundError, match="expected a table at"):
        read_labels(tmp_path / "nothing.tsv")
    with pytest.raises(
        ValueError,
        match="got those of 0: it has names such as 'p0_0', and the labels are of 'P1'",
    ):
        list(transfer_labels(model, draw(1, 1), index, Labels({"P1": frozenset("a")}, "family")))


def run_cli(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_index_and_search(proteins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins[:60]))
    labels = "".join(
        f"{name}\t{'even' if n % 2 == 0 else 'odd'}\n" for n, (name, _) in enumerate(proteins[:60])
    )
    (tmp_path / "l.tsv").write_text(f"id\tparity\n{labels}")
    run_cli("embed", "p.fasta", "-o", "p.parquet")
    said = run_cli("index", "p.parquet", "-o", "p.index")
    assert "Indexed 60 proteins in p.index." in said
    assert "compares 32 features, and hands on 100% of the ten nearest by all 128" in said
    monkeypatch.setattr("rd_torch.searching.recall.CANDIDATES", 5)
    said = run_cli("index", "p.parquet", "-o", "narrow.index", "--width", "3")
    assert said.endswith("An index of --width 32 finds more.\n")
    run_cli("search", "p.fasta", "p.index", "-o", "hits.tsv", "-k", "1")
    rows = lines_of(tmp_path / "hits.tsv")
    assert (
        [row["target"] for row in rows]
        == [row["query"] for row in rows]
        == [name for name, _ in proteins[:60]]
    )
    said = run_cli("search", "p.fasta", "p.index", "-o", "first.jsonl", "--first-stage-only")
    assert "level 28K" in said
    run_cli(
        "search",
        "p.fasta",
        "p.index",
        "-o",
        "l.out.tsv",
        "--labels",
        "l.tsv",
        "--reliability",
        "0",
    )
    for wrong, message in (
        (("--labels", "l.tsv", "--format", "query"), "got it with --labels, whose columns are fixed"),
        (("--label-column", "parity"), "expected --label-column with --labels, got it without"),
        (("--reliability", "0.5"), "expected --reliability with --labels, got it without"),
    ):
        result = CliRunner().invoke(main, ["search", "p.fasta", "p.index", "-o", "w.tsv", *wrong])
        assert (result.exit_code, message in result.output) == (1, True)
    first = {row["query"]: row["label"] for row in reversed(lines_of(tmp_path / "l.out.tsv"))}
    assert first[proteins[0][0]] == "even"


def test_a_hit_is_a_named_tuple_of_plain_values(model, proteins, index):
    hit = next(iter(search(model, draw(1, 30), index)))
    assert isinstance(hit, Hit)
    assert [type(each) for each in hit] == [str, str, int, float, float, int, int]
    assert hit.target_length == len(dict(proteins)[hit.target])
