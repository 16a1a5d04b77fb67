"""What people hold in Python: taken as what is meant, or refused by a sentence."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from Bio.Seq import MutableSeq, Seq
from Bio.SeqRecord import SeqRecord
from helpers import tiny_model

import rd_torch
from rd_torch.levels import ALPHABET
from rd_torch.sequences import Protein
from rd_torch.store import open_store

A, B = "MQIFVKTLTGKTITLEVEPS", "MKTAYIAKQRQ"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model):
    return rd_torch.embed(model, [A, B])


FRAME = pd.DataFrame({"id": ["p1", "p2"], "sequence": [A, B]}, index=[7, 3])
TAKEN = {
    "list": lambda: [A, B],
    "tuple": lambda: (A, B),
    "generator": lambda: (each for each in (A, B)),
    "dict values": {"p1": A, "p2": B}.values,
    "Series": lambda: FRAME["sequence"],
    "Series of pandas strings": lambda: FRAME["sequence"].astype("string"),
    "categories": lambda: FRAME["sequence"].astype("category"),
    "Index": lambda: pd.Index([A, B]),
    "numpy": lambda: np.array([A, B]),
    "numpy objects": lambda: np.array([A, B], dtype=object),
    "pyarrow": lambda: pa.array([A, B]),
    "pyarrow chunks": lambda: pa.chunked_array([[A], [B]]),
    "pyarrow dictionary": lambda: pa.array([A, B]).dictionary_encode(),
    "Seq": lambda: [Seq(A), MutableSeq(B)],
    "SeqRecord": lambda: [SeqRecord(Seq(A), id="p1"), SeqRecord(Seq(B), id="p2")],
    "Protein": lambda: [Protein("p1", A), Protein("p2", B)],
    "pairs": lambda: [("p1", A), ("p2", B)],
    "zip": lambda: zip(FRAME["id"], FRAME["sequence"], strict=True),
    "mixed": lambda: [A, Seq(B)],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_sequences_in_any_container_are_embedded(kind, model, expected):
    np.testing.assert_array_equal(rd_torch.embed(model, TAKEN[kind]()), expected)


def test_a_fasta_file_is_embedded(model, expected, tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(f">p1\n{A}\n>p2\n{B}\n")
    np.testing.assert_array_equal(rd_torch.embed(model, rd_torch.Fasta(path)), expected)


REFUSED = {
    "one string": (A, "several sequences, got one string: put it in a list; a file is read with"),
    "one Seq": (Seq(A), "several sequences, got one: put it in a list"),
    "one record": (SeqRecord(Seq(A)), "several sequences, got one: put it in a list"),
    "one Protein": (Protein("p1", A), "several sequences, got one: put it in a list"),
    "bytes": (A.encode(), "got bytes: decode them"),
    "a path": (Path("in.fasta"), r"got a path: read it with rd_torch\.Fasta\(path\)"),
    "a file": (io.StringIO(A), r"got an open file: pass rd_torch\.Fasta\(path\)"),
    "None": (None, "got NoneType: pass a list"),
    "a number": (5, "got int: pass a list"),
    "a dictionary": ({"p1": A}, r"got a mapping: pass list\(sequences\.values\(\)\)"),
    "a set": ({A, B}, "got a set, which has no order: pass a list"),
    "a frozen set": (frozenset((A,)), "got a set, which has no order"),
    "a DataFrame": (FRAME, r"got a table: pass one column of it, such as frame\['sequence'\]"),
    "a table": (pa.table({"id": ["p1"], "sequence": [A]}), "got a table: pass one column of it"),
    "two dimensions": (np.array([[A, B]]), r"got an array of shape \(1, 2\): pass one column"),
    "a structure": (np.array([("p1", A)], dtype=[("i", "U9"), ("s", "U99")]), "got an array of shape"),
    "tokens": (torch.zeros(2, 5, dtype=torch.long), r"got a tensor: tokens go to the model itself"),
    "None inside": ([A, None], "got None, a missing one, as item number 2"),
    "NaN inside": ([A, float("nan")], "got nan, a missing one, as item number 2"),
    "NA inside": (pd.Series([A, None], dtype="string"), "got <NA>, a missing one, as item number 2"),
    "null inside": (pa.array([A, None]), "got None, a missing one, as item number 2"),
    "bytes inside": ([A, B.encode()], "got bytes as item number 2: decode it"),
    "numbers inside": ([A, 3], "got int as item number 2"),
    "a list inside": ([A, list(B)], "got list as item number 2"),
    "a dictionary inside": ([{"sequence": A}], "got dict as item number 1"),
    "three parts": ([("p1", A, 3)], "got tuple as item number 1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sequence_of_sequences_is_refused(kind, model):
    given, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"expected .*{message}"):
        rd_torch.embed(model, given)
    with pytest.raises(TypeError, match=f"expected .*{message}"):
        rd_torch.fit(dict(model.backbones.items()), given)


PROTEINS = {
    "pairs": lambda: [("p1", A), ("p2", B)],
    "lists of two": lambda: [["p1", A], ["p2", B]],
    "zip of columns": lambda: zip(FRAME["id"], FRAME["sequence"], strict=True),
    "items of a dictionary": {"p1": A, "p2": B}.items,
    "rows": lambda: FRAME.itertuples(index=False),
    "Protein": lambda: [Protein("p1", A), Protein("p2", B)],
    "SeqRecord": lambda: [SeqRecord(Seq(A), id="p1"), SeqRecord(Seq(B), id="p2")],
    "Seq in pairs": lambda: [("p1", Seq(A)), ("p2", Seq(B))],
    "pyarrow": lambda: zip(pa.array(["p1", "p2"]), pa.array([A, B]), strict=True),
}


@pytest.mark.parametrize("kind", PROTEINS)
def test_records_in_any_container_are_stored(kind, model, expected, tmp_path):
    assert rd_torch.embed_to_store(model, PROTEINS[kind](), tmp_path / "out.h5") == {}
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["p1", "p2"]
        np.testing.assert_array_equal(store[:], expected)


def test_numbers_are_identifiers_too(model, tmp_path):
    rd_torch.embed_to_store(model, zip(FRAME.index, FRAME["sequence"], strict=True), tmp_path / "out.h5")
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["7", "3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([A, B], "(identifier, sequence) pairs, got str as item number 1"),
        (["MK", "TA"], "(identifier, sequence) pairs, got str as item number 1"),
        (FRAME["sequence"], "(identifier, sequence) pairs, got str as item number 1"),
        (FRAME, "got a table: pass zip(frame['id'], frame['sequence'])"),
        ({"p1": A, "p2": B}, "got a mapping: pass sequences.items()"),
        ({("p1", A), ("p2", B)}, "got a set, which has no order"),
        (Path("in.fasta"), "got a path: read it with rd_torch.Fasta(path)"),
        ("in.fasta", "got one string: put it in a list; a file is read with rd_torch.Fasta(path)"),
        ([("p1", A), ("p2", B, 3)], "got tuple of 3 parts as item number 2"),
        ([("p1", A), (None, B)], "expected a string as identifier, got NoneType in item number 2"),
        ([("p1", A), (1.5, B)], "expected a string as identifier, got float in item number 2"),
        ([("p1", A), ("p2", B.encode())], "got bytes as item number 2: decode it"),
    ],
)
def test_what_is_no_sequence_of_records_is_refused(given, message, model, tmp_path):
    with pytest.raises(TypeError) as caught:
        rd_torch.embed_to_store(model, given, tmp_path / "out.h5")
    assert str(caught.value).startswith("expected")
    assert message in str(caught.value)
    assert not (tmp_path / "out.h5").exists()


def test_records_without_a_sequence_are_listed_and_the_rest_is_stored(model, tmp_path):
    proteins = [("p1", A), ("p2", None), ("p3", float("nan")), ("p4", ""), ("p5", "M1"), ("p6", B)]
    failures = rd_torch.embed_to_store(model, proteins, tmp_path / "out.h5")
    assert {name: why.line for name, why in failures.items()} == {"p2": 2, "p3": 3, "p4": 4, "p5": 5}
    assert "got '1' at position 2" in failures["p5"].reason
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["p1", "p6"]
    with pytest.raises(ValueError, match="expected a sequence, got None, .* in record p2"):
        rd_torch.embed_to_store(model, proteins, tmp_path / "strict.h5", strict=True)


STRINGS = [
    "MKTAYIAKQR", "mktayiakqr", "MKTay", " MKTAY", "MKTAY\n", "MKTAY\r\n", "\tMKTAY ", "M K T A Y",
    "MKTAY IAKQR Q", "MKTAY\nIAKQR\n", "MKT\u00a0AY", "MKTAY*", "MK*TAY", "MKJT", "mkj t", "XBUZO",
    "A" * 1500,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:letters that are no residue")
@pytest.mark.filterwarnings("ignore:sequences whose")
@pytest.mark.parametrize("text", STRINGS, ids=lambda text: repr(text[:20]))
def test_a_string_means_the_same_at_every_door(text, model, tmp_path):
    tokens = ALPHABET.get_batch_converter()([("p", text)])[2]
    (rows,) = rd_torch.embed(model, [text], pool="none")
    letters = "".join(ALPHABET.get_tok(int(token)) for token in tokens[0, 1:-1])
    assert set(letters) <= set("LAGVSERTIDPKQNFYMHWCXBUZO")
    np.testing.assert_array_equal(rows, rd_torch.embed(model, [letters], pool="none")[0])
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens).embeddings[0, 1:-1].numpy(), rows, atol=2e-5)
    rd_torch.embed_to_store(model, [("p", text)], tmp_path / "out.h5", pool="none")
    with open_store(tmp_path / "out.h5") as store:
        np.testing.assert_array_equal(store["p"], rows)
    path = tmp_path / "in.fasta"
    path.write_text(f">p\n{text}\n", encoding="utf-8", newline="")
    (row,) = rd_torch.embed(model, rd_torch.Fasta(path), pool="none")
    np.testing.assert_array_equal(row, rows)


WRONG = [
    "MK1T", "MK>T", ">p\nMKT", "MK;T", "MK/T", "MK,T", "MK_T", "MK\x00T", "MK\u200bT", "M\u041aT",
    "MK\u00dfT", "MK\u017fT", "nan", "None", "Sequence unavailable", "MK\u2013T", "MK<T",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=repr)
def test_what_is_no_sequence_is_refused_at_every_door(text, model, tmp_path):
    with pytest.raises(ValueError, match="expected .*number 2"):
        rd_torch.embed(model, [A, text])
    with pytest.raises(ValueError, match="expected .*number 2"):
        ALPHABET.get_batch_converter()([("p1", A), ("p", text)])
    failures = rd_torch.embed_to_store(model, [("p1", A), ("p", text)], tmp_path / "out.h5")
    assert list(failures) == ["p"]
    path = tmp_path / "in.fasta"
    path.write_text(f">p1\n{A}\n>p\n{text}\n", encoding="utf-8", newline="")
    failures = rd_torch.embed_to_store(model, rd_torch.Fasta(path), tmp_path / "fasta.h5")
    assert "p" in failures
    if text.startswith(">"):
        return  # a record of its own there, behind an empty one
    with open_store(tmp_path / "fasta.h5") as store:
        assert list(store) == ["p1"]
