"""`Embedder` in scikit-learn's hands: estimator checks, pipelines, searches, clones, joblib."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_sequence, random_stages, tiny_model
from joblib import parallel_backend
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import estimator_checks

import rd_torch
from rd_torch import RDModel
from rd_torch.sklearn import Embedder

SEQUENCES = [random_sequence(12 + k % 7, seed=k) for k in range(40)]
LABELS = np.arange(40.0) % 7


@pytest.fixture
def chain():
    return tiny_model()


@pytest.fixture
def ran(chain):
    """For each backbone of the chain, how many sequences went through it."""
    counts = dict.fromkeys(chain.backbones, 0)

    def count(name):
        def hook(module, given):
            counts[name] += 1

        return hook

    for name, backbone in chain.backbones.items():
        backbone.register_forward_pre_hook(count(name))
    return counts


def sequences_through(monkeypatch):
    """Counts the sequences that are embedded, by width."""
    counts = {}

    def counting(model, sequences, *, width, **options):
        counts[width] = counts.get(width, 0) + len(sequences)
        return rd_torch.embed(model, sequences, width=width, **options)

    monkeypatch.setattr("rd_torch.sklearn.embed", counting)
    return counts


CHECKS = [
    "check_parameters_default_constructible",
    "check_no_attributes_set_in_init",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_valid_tag_types",
    "check_estimator_tags_renamed",
    "check_mixin_order",
]


@pytest.mark.parametrize("check", CHECKS)
def test_scikit_learns_checks_that_need_no_numbers_pass(check):
    getattr(estimator_checks, check)("Embedder", Embedder())


def test_all_other_checks_ask_for_tables_of_numbers():
    with pytest.warns(Warning, match="Can't test estimator Embedder which requires input"):
        estimator_checks.check_estimator(Embedder())


def test_it_gives_the_embeddings_of_embed(chain):
    for options in ({}, {"width": 16}, {"width": 20, "pool": "mean+max"}, {"pool": ["std"]}):
        expected = rd_torch.embed(chain, SEQUENCES, **options)
        found = Embedder(chain, **options).fit_transform(SEQUENCES)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(Embedder(chain, **options).transform(SEQUENCES), expected, atol=1e-6)
    assert Embedder(chain).transform([]).shape == (0, 24)


def test_a_search_over_widths_embeds_each_sequence_once_by_all_backbones(chain, monkeypatch):
    counts = sequences_through(monkeypatch)
    search = GridSearchCV(make_pipeline(Embedder(chain), Ridge()), {"embedder__width": [8, 16, 20, 24]}, cv=4)
    search.fit(SEQUENCES, LABELS)
    assert counts[24] == 40  # each once, for all widths, folds and the last fit
    assert counts == {24: 40, 8: 10}  # the first fold was predicted before it taught, by what it needs
    expected = []
    for width in (8, 16, 20, 24):
        vectors = rd_torch.embed(chain, SEQUENCES, width=width)
        expected.append(cross_val_score(Ridge(), vectors, LABELS, cv=4).mean())
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, atol=1e-3)


def test_new_sequences_run_only_the_backbones_that_the_width_needs(chain, ran):
    search = GridSearchCV(make_pipeline(Embedder(chain), Ridge()), {"embedder__width": [16]}, cv=2)
    search.fit(SEQUENCES, LABELS)
    ran.update(dict.fromkeys(ran, 0))
    search.predict(["MKTAYIAK"])
    assert ran == {"a": 1, "b": 0}
    Embedder(chain, width=10).fit_transform(["MKTAYIAKQR"])
    assert ran == {"a": 2, "b": 0}


def test_clones_share_the_model_and_what_is_kept(chain, ran):
    embedder = Embedder(chain, width=20)
    copy = clone(embedder)
    assert copy.model is chain
    assert copy.get_params() == embedder.get_params()
    embedder.transform(SEQUENCES)
    before = dict(ran)
    copy.transform(SEQUENCES)
    clone(make_pipeline(copy, Ridge())).fit(SEQUENCES, LABELS)
    assert ran == before


def test_equal_sequences_are_embedded_once(chain, monkeypatch):
    counts = sequences_through(monkeypatch)
    assert Embedder(chain).transform(["MKV", "mkv", "MKV", "MK V"]).shape == (4, 24)
    assert counts == {24: 1}


def test_nothing_is_kept_of_a_model_that_has_changed(chain):
    embedder = Embedder(chain)
    before = embedder.transform(["MKV"])
    with torch.no_grad():
        next(chain.backbones["a"].parameters()).mul_(1.5)
    after = embedder.transform(["MKV"])
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, rd_torch.embed(chain, ["MKV"]), atol=1e-6)


def test_the_oldest_embeddings_are_forgotten(chain, monkeypatch):
    monkeypatch.setattr("rd_torch.sklearn.MOST_BYTES", 10 * 24 * 4)
    counts = sequences_through(monkeypatch)
    embedder = Embedder(chain)
    assert embedder.transform(SEQUENCES).shape == (40, 24)
    embedder.transform(SEQUENCES[-10:])
    assert counts == {24: 40}
    embedder.transform(SEQUENCES[:1])
    assert counts == {24: 41}


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_joblib_gives_the_same_scores(backend):
    pipeline = make_pipeline(Embedder(level="28K"), Ridge())
    grid = {"embedder__width": [8, 32]}
    alone = GridSearchCV(pipeline, grid, cv=2).fit(SEQUENCES, LABELS)
    with parallel_backend(backend, n_jobs=2):
        together = GridSearchCV(pipeline, grid, cv=2).fit(SEQUENCES, LABELS)
    scores = [each.cv_results_["mean_test_score"] for each in (alone, together)]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_a_fitted_pipeline_is_pickled_without_what_is_kept(chain):
    pipeline = make_pipeline(Embedder(), Ridge()).fit(SEQUENCES, LABELS)
    packed = pickle.dumps(pipeline)
    assert len(packed) < 20_000
    np.testing.assert_allclose(pickle.loads(packed).predict(SEQUENCES), pipeline.predict(SEQUENCES))


def test_columns_of_a_frame_and_frames_as_output(chain):
    frame = pd.DataFrame({"sequence": SEQUENCES, "pH": LABELS})
    columns = ColumnTransformer(
        [("embed", Embedder(chain, width=3), "sequence"), ("pass", "passthrough", ["pH"])]
    )
    assert columns.fit_transform(frame).shape == (40, 4)
    out = (
        Embedder(chain, width=2, pool="mean+max")
        .set_output(transform="pandas")
        .fit_transform(frame["sequence"])
    )
    assert list(out.columns) == ["mean0", "mean1", "max0", "max1"]
    names = Pipeline([("embed", Embedder(chain, width=1))]).fit(SEQUENCES).get_feature_names_out()
    assert names.tolist() == ["mean0"]


def test_what_is_no_sequence_or_option_is_refused(chain):
    with pytest.raises(TypeError, match="expected several sequences, got a table"):
        Embedder(chain).fit(pd.DataFrame({"sequence": SEQUENCES}))
    with pytest.raises(ValueError, match="got '7' at position 2, in record number 2"):
        Embedder(chain).transform(["MKV", "M7"])
    with pytest.raises(ValueError, match="expected a pool that gives a vector a sequence, got 'none'"):
        Embedder(chain, pool="none").fit(SEQUENCES)
    with pytest.raises(ValueError, match="expected a width from 1 to 24"):
        Embedder(chain, width=99).fit(SEQUENCES)
    with pytest.warns(UserWarning, match="letters that are no residue, read as X: 1"):
        Embedder(chain).transform(["MKJ"])


def test_chains_whose_levels_are_no_prefixes_are_refused(chain):
    raw = RDModel(
        dict(chain.backbones.items()), random_stages(widths={"a": 16, "b": 24}), special_rows="larger"
    )
    assert Embedder(raw).transform(["MKV"]).shape == (1, 24)
    with pytest.raises(ValueError, match="expected a pool over residues, got 'cls'"):
        Embedder(raw, pool="cls").transform(["MKV"])


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['sklearn'] = None; import rd_torch.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "expected scikit-learn for rd_torch.sklearn, got none: pip install rd_torch[learn]" in done.stderr
