"""The benchmark of zero-shot scores in small: it measures what it says, and knows a planted answer."""

import json
import sys

import numpy as np
import pytest

from benchmarks.variants import assays, supervised, zero_shot
from rd_torch.variants import SCORINGS, all_single


def planted(assay="TEST, 1 mutation"):
    """An assay whose fitness is the score of the largest level, turned round."""
    import rd_torch

    wild = "MQIFVKTLTGKTITLEVEPSD"
    variants = list(all_single(wild))[::3]
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    scores = rd_torch.score_variants(model, wild, variants, scoring="masked")["1M"]
    return assays.Assay(assay, wild, variants, -scores)


def test_correlations_are_of_the_scores_with_what_was_measured(tmp_path, monkeypatch, data):
    monkeypatch.setattr(zero_shot, "read_assays", lambda folder, most: [planted()])
    path = tmp_path / "result.json"
    monkeypatch.setattr(
        sys, "argv", [zero_shot.__file__, "--data", str(data), "--few", "5", "--output", str(path)]
    )
    zero_shot.main()
    rows = {(row["scoring"], row["variants"]): row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {("wild-type", 133), ("masked", 133), ("masked", 5), ("pseudo-likelihood", 5)}
    assert rows["masked", 133]["1M"] == -1
    assert rows["masked", 133]["28K"] > -1
    assert rows["masked", 133]["letters alone"] < 0
    assert rows["masked", 133]["1M over 28K [95 %]"].startswith("-0.")


def test_a_head_finds_what_is_planted_at_the_mutated_sites(monkeypatch, tmp_path, data):
    import rd_torch

    assay = planted()
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    rd_torch.embed_variants(
        model, assay.wild_type, assay.variants, tmp_path / "v.h5", pool="sites-difference"
    )
    signal = np.asarray(rd_torch.open_store(tmp_path / "v.h5"))[:, 40]  # in the block that 90K adds
    monkeypatch.setattr(supervised, "read_assays", lambda folder, most: [assay._replace(measured=signal)])
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [supervised.__file__, "--data", str(data), "--output", str(path)])
    supervised.main()
    rows = {row["features"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["one-hot sites and letters", *supervised.WAYS]
    assert rows["sites-difference"]["90K"] > 0.98 > rows["sites-difference"]["28K"]
    assert rows["one-hot sites and letters"]["1M"] < rows["sites-difference"]["90K"]


def test_assays_are_cut_by_their_mutations(data):
    found = list(assays.read_assays(data, 120))
    assert len(found) == 7
    for assay in found:
        counts = {len(each.sites) for each in assay.variants}
        assert counts == {1} if "1 mutation" in assay.name else min(counts) > 1
        assert len(assay.variants) == len(assay.measured) == 120
        assert np.isfinite(assay.measured).all()
        assert assay.few(7).variants == assay.variants[:7]


@pytest.mark.parametrize(("one", "other", "expected"), [([1, 2, 3], [2, 4, 9], 1), ([1, 2, 3], [1, 1, 1], 0)])
def test_the_correlation_is_of_ranks(one, other, expected):
    assert assays.spearman(np.array(one), np.array(other)) == pytest.approx(expected)


def test_supervised_scores_are_of_the_same_sets(data):
    known = assays.supervised_scores()
    assert {assay.name for assay in assays.read_assays(data, 100)} <= set(known)
    assert all(0 < score < 1 for name, score in known.items() if "mutation" in name)
    assert len(SCORINGS) == 4
