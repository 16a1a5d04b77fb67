"""The benchmark of a search among ten million proteins in small: what is drawn, scanned, reported."""

import json
import random
import sys

import numpy as np
import pytest

import rd_torch
from benchmarks.search import scale, synthetic

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    """A store of 200 proteins, twenty families of ten."""
    pytest.importorskip("faiss", reason="needs faiss")
    rng, letters = random.Random(0), "ACDEFGHIKLMNPQRSTVWY"
    parents = ["".join(rng.choices(letters, k=60)) for _ in range(20)]
    records = []
    for number in range(200):
        chain = list(parents[number % 20])
        for place in rng.sample(range(60), 20):
            chain[place] = rng.choice(letters)
        records.append((f"p{number}", "".join(chain)))
    path = tmp_path_factory.mktemp("natural") / "natural.parquet"
    rd_torch.embed_to_store(rd_torch.RDModel.from_pretrained("esm2-rd-mini", device="cpu"), records, path)
    return path


def test_drawn_vectors_are_as_similar_to_theirs_as_queries_are_to_natural_ones(proteins, tmp_path):
    natural = synthetic.Natural.read(proteins)
    assert (len(natural.queries), len(natural.centres), len(natural.lengths)) == (100, 100, 100)
    assert not (natural.queries[:, None] == natural.centres).all(2).any()
    one, other = (
        synthetic.units(each, natural.centres.mean(0)) for each in (natural.queries, natural.centres)
    )
    assert natural.likeness == pytest.approx(np.median((one @ other.T).max(1)), abs=1e-5)
    synthetic.write_store(natural, tmp_path / "drawn.parquet", 5_000)
    with rd_torch.open_store(tmp_path / "drawn.parquet") as store:
        assert len(set(store.identifiers)) == 5_000
        assert store.lengths()[:150] == (natural.lengths * 2)[:150]
        assert (store.facts.save_dtype, store.facts.fingerprint) == ("float16", natural.facts.fingerprint)
        drawn = np.asarray(store, np.float32)
    assert np.cov(drawn.T).trace() == pytest.approx(
        (1 + natural.share) * np.cov(natural.centres.T).trace(), rel=0.05
    )
    similar = (synthetic.units(drawn, natural.centres.mean(0)) @ other.T).max(1)
    assert np.median(similar) == pytest.approx(natural.likeness, abs=0.1)
    assert len(np.unique(drawn, axis=0)) == 5_000


def test_the_scan_finds_what_a_comparison_of_all_finds(proteins, monkeypatch):
    monkeypatch.setattr(scale, "ROWS", 64)
    queries = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
    truth = scale.scan(proteins, queries, [20, 128])
    with rd_torch.open_store(proteins) as store:
        vectors = np.asarray(store, np.float64)
    for width, places in truth.places.items():
        one, other = (
            synthetic.units(each[:, :width], vectors[:, :width].mean(0)) for each in (queries, vectors)
        )
        similarities = one @ other.T
        assert (places == np.argsort(-similarities, axis=1)[:, :10]).all()
    assert truth.likeness == pytest.approx(np.median(np.sort(similarities)[:, [-1, -10]], axis=0), abs=1e-5)


def test_every_index_is_built_searched_and_compared(proteins, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(scale, "AT_A_TIME", (1, 100))
    options = ["--store", proteins, "--proteins", "2000", "--widths", "32", "128", "--clusters", "1", "500"]
    path = tmp_path / "result.json"
    arguments = [*options, "--folder", tmp_path, "--output", path]
    monkeypatch.setattr(sys, "argv", [scale.__file__, *map(str, arguments)])
    scale.main()
    result = json.loads(path.read_text())
    rows = {(row["width"], row["first stage"]): row for row in result["rows"]}
    whole = ("every protein", "500 clusters")
    exact = {(32, "every protein"), (128, "every protein")}
    assert set(rows) == exact | {(32, "1 clusters"), (32, "500 clusters")}
    for (width, name), row in rows.items():
        own, first, both = (
            row[key]
            for key in (
                "first stage, recall by its features",
                "first stage, recall by all features",
                "both stages, recall by all features",
            )
        )
        assert (own == 1) == (name in whole)
        assert own == first if width == 128 else first < own
        assert both > first or width == 128
        assert row["MiB read a query, 1 at a time"] > 10 * row["MiB read a query, 100 at a time"] > 0
        assert row["first stage, ms a query, 1 at a time"] > 0
    assert result["environment"]["files of the store"] == 1
    assert [each.name for each in tmp_path.glob("store.*")] == ["store.parquet"]
