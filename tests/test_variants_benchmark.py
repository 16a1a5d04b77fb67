"""The benchmark of zero-shot scores in small: it measures what it says, and knows a planted answer."""

import json
import sys

import numpy as np
import pytest

from benchmarks.variants import zero_shot
from rd_torch.variants import SCORINGS, all_single


def planted(assay="TEST, 1 mutation"):
    """An assay whose fitness is the score of the largest level, turned round."""
    import rd_torch

    wild = "MQIFVKTLTGKTITLEVEPSD"
    variants = list(all_single(wild))[::3]
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    scores = rd_torch.score_variants(model, wild, variants, scoring="masked")["1M"]
    return zero_shot.Assay(assay, wild, variants, -scores)


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


def test_assays_are_cut_by_their_mutations(data):
    assays = list(zero_shot.read_assays(data, 120))
    assert len(assays) == 7
    for assay in assays:
        counts = {len(each.sites) for each in assay.variants}
        assert counts == {1} if "1 mutation" in assay.name else min(counts) > 1
        assert len(assay.variants) == len(assay.measured) == 120
        assert np.isfinite(assay.measured).all()
        assert assay.few(7).variants == assay.variants[:7]


@pytest.mark.parametrize(("one", "other", "expected"), [([1, 2, 3], [2, 4, 9], 1), ([1, 2, 3], [1, 1, 1], 0)])
def test_the_correlation_is_of_ranks(one, other, expected):
    assert zero_shot.spearman(np.array(one), np.array(other)) == pytest.approx(expected)


def test_supervised_scores_are_of_the_same_sets(data):
    known = zero_shot.supervised_scores()
    assert {assay.name for assay in zero_shot.read_assays(data, 100)} <= set(known)
    assert all(0 < score < 1 for name, score in known.items() if "mutation" in name)
    assert len(SCORINGS) == 4
