"""A store as a data set: for PyTorch, numpy and scikit-learn, in every format alike."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import random_sequence, tiny_model
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_predict, train_test_split
from torch.utils.data import ConcatDataset, DataLoader, Subset, random_split

import rd_torch
from rd_torch.store import open_store

COUNT = 40
KINDS = [("h5", "mean"), ("parquet", "mean"), ("pt", "mean"), ("h5", "none"), ("pt", "none")]
POOLED = [kind for kind in KINDS if kind[1] == "mean"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    model = tiny_model()
    proteins = [(f"p{k}", random_sequence(5 + k % 7, k)) for k in range(COUNT)]
    folder = tmp_path_factory.mktemp("stores")

    def path(suffix, pool):
        found = folder / f"{pool}.{suffix}"
        if not found.exists():
            rd_torch.embed_to_store(model, proteins, found, pool=pool, tokens_per_batch=40)
        return found

    return path


@pytest.fixture(params=KINDS, ids="-".join)
def store(request, stores):
    with open_store(stores(*request.param)) as opened:
        yield opened


@pytest.fixture(params=POOLED, ids="-".join)
def pooled(request, stores):
    with open_store(stores(*request.param)) as opened:
        yield opened


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_a_pickled_store_is_opened_anew_by_its_path(store, tmp_path, monkeypatch):
    monkeypatch.chdir(store.path.parent)
    with open_store(store.path.name) as relative:
        data = pickle.dumps(relative)
    monkeypatch.chdir(tmp_path)
    for again in (pickle.loads(data), copy.copy(store), copy.deepcopy(store)):
        assert list(again) == list(store)
        assert same(again[:], store[:])
        again.close()
    assert same(store[:3], store[[0, 1, 2]]), "the first one is still open"


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        *((kind, "fork") for kind in KINDS),
        (KINDS[0], "spawn"),
        (KINDS[1], "forkserver"),
        (KINDS[2], "forkserver"),
    ],
)
def test_a_data_loader_reads_it_in_other_processes(stores, kind, start):
    store = open_store(stores(*kind))
    store[0]  # something is open and read before
    loader = DataLoader(
        store, batch_size=7, num_workers=2, multiprocessing_context=start, collate_fn=list, shuffle=False
    )
    read = [np.asarray(row) for batch in loader for row in batch]
    assert same(read, store[:])


def test_processes_that_were_forked_do_not_disturb_each_other(store):
    expected = store[:]
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            good = all(same(store[:], expected) for _ in range(5))
            os._exit(0 if good else 1)
        children.append(child)
    assert all(same(store[:], expected) for _ in range(5))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_another_process_opens_the_files_anew_and_once(store, monkeypatch):
    opened, real = [], type(store)._open
    monkeypatch.setattr(type(store), "_open", lambda self: opened.append(self) or real(self))
    first = store[0]
    assert not opened
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert np.array_equal(store[0], first)
    assert store[1] is not None
    assert opened == [store]


def test_places_of_every_kind_are_read(store):
    whole = store[:]
    for key in (
        3,
        np.int64(3),
        np.uint8(3),
        torch.tensor(3),
        np.array(3),
        -37,
        np.int32(-37),
        "p3",
        np.str_("p3"),
    ):
        assert np.array_equal(store[key], whole[3]), repr(key)
    mask = np.arange(COUNT) % 3 == 0
    for keys in (
        [0, 5, -1], (0, 5, -1), np.array([0, 5, -1]), torch.tensor([0, 5, -1]), ["p0", "p5", "p39"],
        np.array(["p0", "p5", "p39"]), [0, "p5", np.int64(39)], iter([0, 5, 39]),
    ):  # fmt: skip
        assert same(store[keys], [whole[0], whole[5], whole[-1]])
    for several in (mask, mask.tolist(), torch.tensor(mask)):
        assert same(store[several], [row for row, chosen in zip(whole, mask, strict=True) if chosen])
    assert same(store[range(2, 9, 3)], [whole[2], whole[5], whole[8]])
    assert same(store[::-7], whole[::-7])
    assert len(store[[]]) == 0


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (COUNT, IndexError, "expected a place below 40, got 40"),
        (-COUNT - 1, IndexError, "expected a place below 40, got -41"),
        ([0, COUNT], IndexError, "expected a place below 40, got 40"),
        (True, TypeError, "expected an identifier or a place, got True"),
        (1.0, TypeError, "expected an identifier or a place, got float"),
        (None, TypeError, "expected an identifier or a place, got NoneType"),
        ([True, False], IndexError, "expected a mask of 40 truth values, got 2"),
        ("gone", KeyError, "expected an identifier that is in"),
        (["p1", "gone"], KeyError, "expected an identifier that is in"),
    ],
)
def test_keys_that_are_none_are_refused(store, key, error, message):
    with pytest.raises(error, match=message):
        store[key]


def test_a_place_in_parquet_is_read_without_the_names_of_all(stores):
    with open_store(stores("parquet", "mean")) as store:
        store[3], store[[5, -1]], store[2:4], store[np.arange(COUNT) < 3]
        assert not {"identifiers", "_places"} & vars(store).keys()


def test_a_loop_over_places_ends(store):
    assert sum(1 for _ in store) == len(store) == COUNT
    assert [store[place].shape for place in range(len(store))] == [row.shape for row in store[:]]


def test_the_pieces_of_pytorch_take_it(store):
    whole = store[:]
    first, second = random_split(store, [30, 10], torch.Generator().manual_seed(0))
    assert sorted([*first.indices, *second.indices]) == list(range(COUNT))
    assert np.array_equal(first[0], whole[first.indices[0]])
    assert same([Subset(store, [4, 2])[place] for place in (0, 1)], [whole[4], whole[2]])
    assert same(Subset(store, [4, 2]).__getitems__([0, 1]), [whole[4], whole[2]])
    assert np.array_equal(ConcatDataset([store, store])[COUNT + 2], whole[2])


def test_a_data_loader_makes_batches_of_tensors(pooled):
    batches = list(DataLoader(pooled, batch_size=16))
    assert [tuple(batch.shape) for batch in batches] == [(16, 24), (16, 24), (8, 24)]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), pooled[:])


def test_it_is_an_array_for_numpy_and_scikit_learn(pooled):
    array = np.asarray(pooled)
    np.testing.assert_array_equal(array, pooled[:])
    assert pooled.shape == array.shape == (COUNT, 24)
    assert np.asarray(pooled, dtype=np.float64).dtype == np.float64
    np.testing.assert_array_equal(torch.as_tensor(np.asarray(pooled)).numpy(), array)
    labels = array[:, 0] * 2
    np.testing.assert_array_equal(
        cross_val_predict(Ridge(), pooled, labels), cross_val_predict(Ridge(), array, labels)
    )
    for one, other in zip(
        train_test_split(pooled, labels, random_state=0),
        train_test_split(array, labels, random_state=0),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("suffix", ["h5", "pt"])
def test_without_pooling_it_is_no_array_and_says_so(stores, suffix):
    with open_store(stores(suffix, "none")) as store:
        assert not hasattr(store, "shape")
        with pytest.raises(TypeError, match="expected a pooled store, got one of a vector a residue"):
            np.asarray(store)


def test_a_closed_store_says_so(store):
    again = copy.copy(store)
    again.close()
    again.close()
    with pytest.raises(ValueError, match="expected an open store, got one that was closed"):
        again[0]
