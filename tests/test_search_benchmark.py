"""The benchmarks of search in small: shares are of what they say, and planted families are found."""

import json
import lzma
import random
import sys

import numpy as np
import pytest

import rd_torch
from benchmarks.search import families, labels, recall
from benchmarks.search.copies import write_copies
from benchmarks.search.exact import Exact, principal_components, random_projections
from benchmarks.search.labelled import Labelled, read_labelled, share_with_interval, split
from benchmarks.search.parts import index_of, write_part

pytestmark = pytest.mark.usefixtures("one_thread")
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def draw_protein(rng, low, high):
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def mutate(sequence, rng, count):
    letters = list(sequence)
    for place in rng.sample(range(len(letters)), count):
        letters[place] = rng.choice(LETTERS)
    return "".join(letters)


@pytest.fixture(scope="module")
def model():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini", device="cpu")


@pytest.fixture(scope="module")
def stores(model, tmp_path_factory):
    """A store of 1,000 short proteins, and one of queries."""
    folder, rng = tmp_path_factory.mktemp("stores"), random.Random(0)
    for name, count in (("proteins", 1_000), ("queries", 30)):
        drawn = [(f"{name}{number}", draw_protein(rng, 5, 15)) for number in range(count)]
        rd_torch.embed_to_store(model, drawn, folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def family_data(model, tmp_path_factory):
    """A data folder of close families, 12 superfamilies, two of a fold and 12 names, and its store."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(1)
    lines = []
    for family in range(12):
        parent = draw_protein(rng, 60, 80)
        for member in range(6):
            changed = mutate(parent, rng, 3)
            lines.append(
                f">d{family}_{member} src=SCOPe40 id=x{member}/a.{family // 2}.{family}.1\n{changed}"
            )
        parent = draw_protein(rng, 60, 80)
        for member in range(4):
            changed = mutate(parent, rng, 3)
            lines.append(f">u{family}_{member} src=UP:X id=sp|P{member}|N{family}_{member}\n{changed}")
    lines += [f">o{number} src=other id=o{number}\n{draw_protein(rng, 60, 80)}" for number in range(5)]
    with lzma.open(folder / "natural50_train.fasta.xz", "wt") as handle:
        handle.write("\n".join(lines) + "\n")
    proteins = rd_torch.Fasta(folder / "natural50_train.fasta.xz")
    rd_torch.embed_to_store(model, proteins, folder / "train.parquet")
    return folder


def run(script, monkeypatch, folder, *arguments):
    path = folder / "result.json"
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments), "--output", str(path)])
    script.main()
    return json.loads(path.read_text())["rows"]


def test_a_part_of_a_store_has_its_records_and_its_facts(stores, tmp_path):
    names = [f"proteins{number}" for number in (5, 900, 3)]
    with rd_torch.open_store(stores / "proteins.parquet") as store:
        write_part(store, names, tmp_path / "part.parquet")
        with rd_torch.open_store(tmp_path / "part.parquet") as part:
            assert list(part) == names
            assert part.facts == store.facts
            assert part.lengths() == [store.lengths()[number] for number in (5, 900, 3)]
            assert (np.asarray(part) == store.read(names)).all()
        with index_of(store, [f"proteins{number}" for number in range(50)], 48) as index:
            assert (len(index), index.config.first_width) == (50, 48)


def test_recall_is_of_the_nearest_and_ties_count():
    rng = np.random.default_rng(1)
    proteins, queries = rng.normal(size=(300, 6)), rng.normal(size=(7, 6))
    proteins[299] = proteins[0]
    exact = Exact.of(queries, proteins)
    mean = proteins.mean(0)
    one, other = queries - mean, proteins - mean
    cosines = (one @ other.T) / np.linalg.norm(one, axis=1, keepdims=True) / np.linalg.norm(other, axis=1)
    order = np.argsort(-cosines, axis=1)
    assert np.allclose(exact.cosines(order), np.take_along_axis(cosines, order, 1))
    assert [each.tolist() for each in exact.recalls(order)] == [[1.0] * 7] * 3
    assert [each.mean() for each in exact.recalls(order[:, 5:])] == pytest.approx([0, 0.5, 0.95])
    assert exact.recalls(order[:, :10])[2] is None
    swapped = np.where(order == 0, 299, np.where(order == 299, 0, order))
    assert [each.tolist() for each in exact.recalls(swapped)] == [[1.0] * 7] * 3
    shuffled = rng.permuted(order[:, :20], axis=1)
    assert [each.mean() for each in exact.recalls(exact.in_order(shuffled))[:2]] == [1, 1]


def test_projections_of_every_feature_lose_nothing_and_of_few_something():
    rng = np.random.default_rng(0)
    proteins, queries = rng.normal(size=(300, 8)), rng.normal(size=(20, 8))
    proteins[:, 2:] *= 1e-3
    queries[:, 2:] *= 1e-3
    exact = Exact.of(queries, proteins)
    found = exact.by_codes(principal_components(proteins, 8), 100)
    assert [each.mean() for each in exact.recalls(found)] == [1, 1, 1]
    two = exact.by_codes(principal_components(proteins, 2), 100)
    drawn = [exact.by_codes(each, 100) for each in random_projections(8, 2, 3)]
    assert exact.recalls(two)[1].mean() > 0.95 > max(exact.recalls(each)[1].mean() for each in drawn)
    assert not (drawn[0] == drawn[1]).all()


def test_recall_rises_with_candidates_and_is_whole_by_all_features(stores, monkeypatch, tmp_path):
    options = ["--store", stores / "proteins.parquet", "--queries", stores / "queries.parquet", "--rounds", 1]
    rows = run(recall, monkeypatch, tmp_path, *options, "--picture", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    by_key = {(row["proteins"], row["first stage"], row["features"], row["candidates"]): row for row in rows}
    assert {key[0] for key in by_key} == {100, 333, 1_000}
    for size in (100, 333, 1_000):
        whole = by_key[size, "prefix", 128, None]
        assert [whole[f"recall@{count}"] for count in (1, 10, 100)] == [1, 1, 1]
    for first in ("prefix", "random projection", "principal components"):
        for features in (32, 48, 64):
            alone = by_key[1_000, first, features, None]
            cut = [by_key[1_000, first, features, count] for count in (30, 100, 300, 1_000)]
            assert [row["recall@10"] for row in cut] == sorted(row["recall@10"] for row in cut)
            assert cut[-1]["recall@100"] == 1
            assert cut[0]["recall@100"] is None
            assert cut[1]["recall@100"] == pytest.approx(alone["recall@100"], abs=1e-3)
            assert cut[2]["MiB a query"] == pytest.approx(
                4 * (features * 1_000 + 128 * 300) / 2**20, abs=0.01
            )
            assert all((row["ms a query"] is None) == (first != "prefix") for row in cut)
    assert by_key[1_000, "prefix", 64, 300]["first stage, MiB"] == pytest.approx(0.24, abs=0.01)


def test_families_are_read_from_headers(family_data):
    with rd_torch.open_store(family_data / "train.parquet") as store:
        sets, composition = read_labelled(family_data, store)
    superfamilies, folds, names = sets
    assert superfamilies.labels["d7_2"] == "a.3.7"
    assert folds.labels["d7_2"] == "a.3"
    assert names.labels["u7_2"] == "N7"
    assert [len(each.labels) for each in sets] == [72, 72, 48]
    assert set(composition) == {*superfamilies.labels, *names.labels}
    assert composition["d7_2"].sum() == pytest.approx(1)


def test_nothing_is_known_of_a_held_out_family_and_something_of_the_others():
    labelled = Labelled("some", {f"p{n}": f"f{n % 40}" for n in range(200)} | {"single": "alone"})
    drawn = split(labelled, 3)
    assert drawn != split(labelled, 4)
    assert sorted([*drawn.known, *drawn.related, *drawn.strange]) == sorted(labelled.labels)
    known = {labelled.labels[protein] for protein in drawn.known}
    assert known.isdisjoint(labelled.labels[protein] for protein in drawn.strange)
    assert {labelled.labels[protein] for protein in drawn.related} <= known
    assert len({labelled.labels[protein] for protein in drawn.strange}) == 8
    assert 15 <= len(drawn.related) <= 50


def test_a_share_has_an_interval_over_families():
    assert share_with_interval(["a", "a", "b"], [True, True, True]) == "1.000 [1.000, 1.000]"
    assert share_with_interval(["a"] * 4, [True, False, True, True]) == "0.750 [0.750, 0.750]"
    assert share_with_interval(["a", "b"], [True, False], [3, 1]).startswith("0.750 [0.000, 1.000")
    many = share_with_interval([str(n) for n in range(400)], [n % 2 == 0 for n in range(400)])
    low, high = map(float, many.split("[")[1][:-1].split(","))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_planted_families_are_found_and_shuffled_ones_are_not(family_data, model, monkeypatch, tmp_path):
    rows = run(
        families, monkeypatch, tmp_path, "--store", family_data / "train.parquet", "--data", family_data
    )
    shares = {(row["families"], row["compared by"]): float(row["nearest is right"][:5]) for row in rows}
    assert len(shares) == 3 * 6
    for way in ("the first 128", "the first 32, then all of 300 candidates"):
        assert shares["SCOPe superfamily", way] > 0.9
        assert shares["Swiss-Prot name", way] > 0.9
        assert shares["SCOPe fold", way] >= shares["SCOPe superfamily", way]
    assert float(rows[0]["by chance"]) == pytest.approx(5 / 71, abs=1e-4)
    with rd_torch.open_store(family_data / "train.parquet") as store:
        (known, *_), composition = read_labelled(family_data, store)
        shuffled = list(known.labels.values())
        random.Random(0).shuffle(shuffled)
        mixed = Labelled("shuffled", dict(zip(known.labels, shuffled, strict=True)))
        for row in families.rows_of(model, store, mixed, composition):
            assert float(row["nearest is right"][:5]) < 0.25


def test_labels_of_planted_families_are_right_and_strangers_get_few(family_data, monkeypatch, tmp_path):
    options = ["--store", family_data / "train.parquet", "--data", family_data, "--draws", 2, "--domains", 12]
    rows = run(labels, monkeypatch, tmp_path, *options)
    cut = {(row["labels"], row["stated, from"], row["to"]): row for row in rows}
    assert len(rows) == 4 * (3 + 6)
    assert len(cut) == 4 * (3 + 5)  # from 0.9 on, what is asked for is a whole range
    asked = cut["SCOPe superfamily", 0.5, 1.0]
    assert float(asked["known, labelled"]) > 0.6
    assert float(asked["right"][:5]) > 0.9
    assert float(asked["unknown, labelled"]) < 0.3
    assert float(asked["half: stated"]) >= 0.5
    for name in ("SCOPe superfamily", "Swiss-Prot name"):
        ranges = [row for row in rows if row["labels"] == name and row["foretold"] is None]
        assert sum(float(row["known, labelled"]) for row in ranges) == pytest.approx(1, abs=0.004)
        assert sum(float(row["unknown, labelled"]) for row in ranges) == pytest.approx(1, abs=0.004)


def test_copies_differ_from_their_domains_and_come_from_one_superfamily_each(family_data, model, tmp_path):
    made = write_copies(model, family_data, tmp_path / "copies.parquet", 8, 4)
    assert len(made.labels) == 32
    assert {len(members) for members in made.families().values()} == {4}
    assert len({name.split("_")[0] for name in made.labels}) == 8
    with rd_torch.open_store(tmp_path / "copies.parquet") as store:
        assert list(store) == list(made.labels)
        rows = np.asarray(store)
    assert len(np.unique(rows, axis=0)) == 32
