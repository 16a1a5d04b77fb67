"""Stores in the containers of other libraries: pandas, anndata, data sets of torch."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from helpers import small_model
from torch.utils.data import DataLoader

import rd_torch
from rd_torch.biotrainer import embedding_functions

PROTEINS = [("one", "MKTAYIAKQR"), ("two", "MKV"), ("three", "ACDEFGHIKLMNPQRSTVWY")]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(params=["h5", "parquet"])
def pooled(request, model, tmp_path):
    rd_torch.embed_to_store(model, PROTEINS, tmp_path / f"pooled.{request.param}", pool="mean+max")
    with rd_torch.open_store(tmp_path / f"pooled.{request.param}") as store:
        yield store


@pytest.fixture
def residues(model, tmp_path):
    rd_torch.embed_to_store(model, PROTEINS, tmp_path / "residues.h5", pool="none")
    with rd_torch.open_store(tmp_path / "residues.h5") as store:
        yield store


def test_frames_have_a_row_for_each_record(pooled):
    frame = pooled.to_dataframe()
    assert list(frame.index) == ["one", "two", "three"]
    np.testing.assert_array_equal(frame.to_numpy(), pooled.read(slice(None)))
    narrow = pooled.to_dataframe(width=2)
    assert list(narrow.columns) == ["mean0", "mean1", "max0", "max1"]
    np.testing.assert_array_equal(narrow.to_numpy(), frame[narrow.columns].to_numpy())
    with pytest.raises(ValueError, match="expected a width from 1 to 64, got 65"):
        pooled.to_dataframe(width=65)


def test_frames_have_a_row_for_each_residue(residues):
    frame = residues.to_dataframe(width=5)
    assert frame.shape == (33, 5)
    assert list(frame.index[9:12]) == [("one", 10), ("two", 1), ("two", 2)]
    np.testing.assert_array_equal(frame.loc["two"].to_numpy(), residues.read("two", width=5))


def test_anndata_says_what_a_row_and_a_column_is(pooled):
    found = pooled.to_anndata()
    assert list(found.obs_names) == ["one", "two", "three"]
    np.testing.assert_array_equal(found.X, pooled.read(slice(None)))
    assert list(found.obs.get("length", [10, 3, 20])) == [10, 3, 20]
    assert list(found.var["level"]) == [*["a"] * 32, *["b"] * 16, *["c"] * 16] * 2
    assert json.loads(found.uns["rd_torch"])["fingerprint"] == pooled.facts.fingerprint
    narrow = pooled.to_anndata(width=40)
    assert list(narrow.var["level"]) == [*["a"] * 32, *["b"] * 8] * 2
    assert list(narrow.var_names[39:41]) == ["mean39", "max0"]


def test_anndata_of_residues_is_refused(residues):
    with pytest.raises(ValueError, match="expected a pooled store, got one of a vector a residue"):
        residues.to_anndata()


@pytest.mark.parametrize("workers", [0, 2])
def test_data_sets_give_tensors_with_labels(pooled, workers):
    data = pooled.as_torch_dataset({"three": 3.5, "one": 1.5}, width=8)
    assert data.identifiers == ["one", "three"]
    ((vectors, labels),) = DataLoader(data, batch_size=2, num_workers=workers)
    assert torch.equal(vectors, torch.from_numpy(pooled.read(["one", "three"], width=8)))
    assert labels.tolist() == [1.5, 3.5]
    assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], vectors[1])


def test_data_sets_without_labels_give_tensors(residues):
    data = residues.as_torch_dataset()
    assert len(data) == 3
    assert [len(each) for each in DataLoader(data, batch_size=None)] == [10, 3, 20]
    with pytest.raises(KeyError, match="expected labels of records in the store, got 1 of others: 'four'"):
        residues.as_torch_dataset({"four": 1})
    with pytest.raises(ValueError, match="expected a label for some record of the store, got none"):
        residues.as_torch_dataset({})


def test_a_missing_library_is_named(pooled, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"got none: pip install rd_torch\[frames\]"):
        pooled.to_dataframe()


def test_biotrainer_gets_sequences_with_their_embeddings(model):
    functions = embedding_functions(model, width=48)
    sequences = [sequence for _, sequence in PROTEINS]
    by_residue = dict(functions["custom_embedding_function_per_residue"](iter(sequences)))
    by_sequence = dict(functions["custom_embedding_function_per_sequence"](sequences))
    assert list(by_residue) == list(by_sequence) == sequences
    for sequence in sequences:
        assert by_residue[sequence].shape == (len(sequence), 48)
        torch.testing.assert_close(by_sequence[sequence], by_residue[sequence].mean(0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="expected a width from 1 to 64"):
        embedding_functions(model, width=65)
