"""Files of other programs: their own identities, every fact that they state, and ours for their readers."""

import h5py
import numpy as np
import pytest
import torch
from helpers import random_esm2, random_sequence, random_stages

import rd_torch
from rd_torch.combining import combine_stores
from rd_torch.nesting import Nesting
from rd_torch.store import open_store

NAMES = [f"P{k}" for k in range(12)]


@pytest.fixture(scope="module")
def model():
    backbones = {"a": random_esm2(1, 16, 4), "b": random_esm2(2, 24, 4, seed=1)}
    return rd_torch.RDModel(backbones, random_stages(widths={"a": 16, "b": 24})).eval()


@pytest.fixture(scope="module")
def nesting(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "small"
    model.save_pretrained(folder)
    return Nesting.from_pretrained(folder)


def raw(model, level, pool="mean"):
    """Raw embeddings of the proteins by one backbone."""
    alone = rd_torch.RDModel({level: model.backbones[level]}, []).eval()
    sequences = [random_sequence(5 + k, k) for k in range(len(NAMES))]
    return dict(zip(NAMES, rd_torch.embed(alone, sequences, pool=pool), strict=True))


def nested(model, pool="mean"):
    sequences = [random_sequence(5 + k, k) for k in range(len(NAMES))]
    return dict(zip(NAMES, rd_torch.embed(model, sequences, pool=pool), strict=True))


def numbered(path, rows, order=None, **attributes):
    """As bio_embeddings, biotrainer and the ProtTrans releases write: numbers, names as an attribute."""
    with h5py.File(path, "w") as file:
        for number, name in enumerate(order or rows):
            file.create_dataset(str(number), data=rows[name]).attrs["original_id"] = name
        file.attrs.update(attributes)
    return path


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_numbered_files_in_any_order_are_matched_by_original_id(model, nesting, tmp_path, pool):
    inputs = {
        "a": numbered(tmp_path / "a.h5", raw(model, "a", pool)),
        "b": numbered(tmp_path / "b.h5", raw(model, "b", pool), order=NAMES[::-1]),
    }
    combine_stores(nesting, inputs, tmp_path / "out.h5")
    expected = nested(model, pool)
    with open_store(tmp_path / "out.h5") as store:
        assert set(store) == set(NAMES)
        for name in NAMES:
            np.testing.assert_allclose(store[name], expected[name], atol=2e-5)


def test_the_name_may_be_bytes_or_an_array_of_one(model, tmp_path):
    rows = raw(model, "a")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number, (name, row) in enumerate(rows.items()):
            attribute = (name, name.encode(), np.array([name.encode()]))[number % 3]
            file.create_dataset(f"{number:032x}", data=row).attrs["original_id"] = attribute
    with open_store(tmp_path / "a.h5") as store:
        assert set(store) == set(NAMES)
        np.testing.assert_array_equal(store["P1"], rows["P1"])
        assert "0" * 32 not in store


def test_names_with_slashes_lie_in_groups(model, nesting, tmp_path):
    inputs = {}
    for level in "ab":
        inputs[level] = tmp_path / f"{level}.h5"
        with h5py.File(inputs[level], "w") as file:
            for name, row in raw(model, level).items():
                file[f"sp/{name}/x" if name != "P3" else "plain"] = row
    combine_stores(nesting, inputs, tmp_path / "out.h5")
    expected = nested(model)
    with open_store(tmp_path / "out.h5") as store:
        assert set(store) == {"plain", *(f"sp/{name}/x" for name in NAMES if name != "P3")}
        np.testing.assert_allclose(store["sp/P1/x"], expected["P1"], atol=2e-5)
        np.testing.assert_allclose(store["plain"], expected["P3"], atol=2e-5)


def spoiled(path, rows, how):
    numbered(path, rows)
    with h5py.File(path, "a") as file:
        how(file)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda file: file["3"].attrs.pop("original_id"),
            "attribute original_id at every dataset .*none at '3'",
        ),
        (
            lambda file: file["3"].attrs.modify("original_id", "P4"),
            "got the attribute original_id 'P4' twice",
        ),
        (lambda file: file.create_dataset("ids", data=np.array([b"x"])), "original_id at every"),
        (lambda file: file.clear(), "got none"),
    ],
)
def test_files_whose_names_cannot_be_told_are_refused(model, tmp_path, how, message):
    with pytest.raises(ValueError, match=f"expected .*{message}"):
        open_store(spoiled(tmp_path / "a.h5", raw(model, "a"), how))[:]


@pytest.mark.parametrize(
    "datasets",
    [
        {"P1": np.zeros(16, np.float32), "P2": np.zeros((3, 16), np.float32)},
        {"P1": np.zeros(16, np.float32), "P2": np.zeros(17, np.float32)},
        {"P1": np.zeros(16, np.float32), "P2": np.zeros(16, np.int64)},
        {"identifiers": np.array([b"P1", b"P2"]), "embeddings": np.zeros((2, 16), np.float32)},
        {"P1": np.float32(3)},
        {"P1": np.zeros((2, 3, 16), np.float32)},
    ],
    ids=["dimensions", "widths", "integers", "a table of all", "scalars", "three dimensions"],
)
def test_files_of_another_layout_are_refused(tmp_path, datasets):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, data in datasets.items():
            file[name] = data
    with pytest.raises(ValueError, match="expected one dataset a protein, of floating-point numbers"):
        open_store(tmp_path / "a.h5")[:]


def test_numbers_without_names_are_read_alone_but_match_nothing(model, nesting, tmp_path):
    inputs = {}
    for level in "ab":
        inputs[level] = tmp_path / f"{level}.h5"
        with h5py.File(inputs[level], "w") as file:
            for number, row in enumerate(raw(model, level).values()):
                file[str(number)] = row
    with open_store(inputs["a"]) as store:
        assert set(store) == set(map(str, range(len(NAMES))))
    with pytest.raises(ValueError, match="expected the names of proteins in .*, got the numbers 0 to 11"):
        combine_stores(nesting, inputs, tmp_path / "out.h5")
    combine_stores(nesting, {"a": inputs["a"]}, tmp_path / "alone.h5")


def test_numbers_that_are_not_finite_are_refused(model, nesting, tmp_path):
    rows = raw(model, "a")
    rows["P5"] = rows["P5"] * np.nan
    inputs = {"a": numbered(tmp_path / "a.h5", rows)}
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity for 'P5'"):
        combine_stores(nesting, inputs, tmp_path / "out.h5")


def fair_esm(folder, rows, layer, label=None):
    folder.mkdir()
    for name, row in rows.items():
        kept = {"label": label or name, "mean_representations": {layer: torch.tensor(row)}}
        torch.save(kept, folder / f"{name}.pt")
    return folder


def test_folders_of_fair_esm_state_layer_and_label(model, nesting, tmp_path):
    rows = {level: raw(model, level) for level in "ab"}
    inputs = {"a": fair_esm(tmp_path / "a", rows["a"], 1), "b": fair_esm(tmp_path / "b", rows["b"], 2)}
    combine_stores(nesting, inputs, tmp_path / "out.h5")
    early = {**inputs, "b": fair_esm(tmp_path / "early", rows["b"], 1)}
    with pytest.raises(
        ValueError, match="expected embeddings of the last layer, 2, at level b, got those of layer 1"
    ):
        combine_stores(nesting, early, tmp_path / "early.h5")
    with pytest.raises(
        ValueError, match="expected the record 'P0' in .*, got that of 'other', as its label says"
    ):
        open_store(fair_esm(tmp_path / "renamed", rows["a"], 1, label="other"))
    torch.save(
        {"label": "P5", "mean_representations": {3: torch.tensor(rows["a"]["P5"])}}, tmp_path / "a" / "P5.pt"
    )
    with pytest.raises(
        ValueError, match="expected the embedding of layer 1 in .*P5.pt, .* got that of layer 3"
    ):
        combine_stores(nesting, inputs, tmp_path / "mixed.h5")


def test_our_own_raw_stores_state_their_layers_too(model, nesting, tmp_path):
    proteins = [(name, random_sequence(5, k)) for k, name in enumerate(NAMES)]
    other = rd_torch.RDModel({"a": random_esm2(3, 16, 4)}, []).eval()
    rd_torch.embed_to_store(other, proteins, tmp_path / "a.h5")
    with pytest.raises(
        ValueError, match="expected embeddings of the last layer, 1, at level a, got those of layer 3"
    ):
        combine_stores(nesting, {"a": tmp_path / "a.h5"}, tmp_path / "out.h5")


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ("esm2_t6_8M_UR50D", True), ("facebook/esm2_t6_8M_UR50D", True), ("ESM-2 8M", True), ("mine", True),
        ("esm2_t12_35M_UR50D", False), ("esm2_t33_650M_UR50D", False), ("Rostlab/prot_t5_xl_uniref50", False),
        ("esm1b_t33_650M_UR50S", False), ("esmc_300m", False), ("ProtBert", False),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_model_must_fit_the_level(said, fits, tmp_path):
    from rd_torch.levels import ESM2_LEVELS
    from rd_torch.matching import require_level

    numbered(tmp_path / "a.h5", {"P1": np.zeros(320, np.float32)}, model_name=said)
    with open_store(tmp_path / "a.h5") as store:
        assert store.model_name == said
        if fits:
            require_level(ESM2_LEVELS["8M"], store)
        else:
            with pytest.raises(
                ValueError, match="expected embeddings of ESM-2 8M, got those of .* as the file says"
            ):
                require_level(ESM2_LEVELS["8M"], store)


# Ours for others


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_ours_is_read_as_biotrainer_and_protspace_document_it(model, tmp_path, pool):
    """biotrainer: `{file[i].attrs["original_id"]: embedding}`; ProtSpace: `file.attrs["model_name"]`."""
    names = ["P1", "sp|P2|X", "a/b", "x" * 40_000]
    proteins = [(name, random_sequence(6, k)) for k, name in enumerate(names)]
    rd_torch.embed_to_store(model, proteins, tmp_path / "out.h5", name="rd.small", pool=pool)
    expected = rd_torch.embed(model, [sequence for _, sequence in proteins], pool=pool)
    with h5py.File(tmp_path / "out.h5") as file:
        found = {file[key].attrs["original_id"]: np.array(each) for key, each in file.items()}
        assert file.attrs["model_name"] == "rd.small"
        assert not any(isinstance(each, h5py.Group) for each in file.values())
    assert found.keys() == set(names)
    for name, row in zip(names, expected, strict=True):
        np.testing.assert_array_equal(found[name], row)
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == names, "long names are read whole again"
