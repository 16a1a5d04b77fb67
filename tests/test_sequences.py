import gzip
import lzma
import random

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from rd_torch.backbone.tokens import is_residue, tokenize
from rd_torch.cli import main
from rd_torch.letters import RESIDUE_LETTERS, Corrections, read_residues
from rd_torch.levels import ALPHABET
from rd_torch.reading import Fasta
from rd_torch.sequences import Protein, cut_batches, normalize, normalize_sequences

LETTERS = st.text(alphabet="".join(sorted(RESIDUE_LETTERS)), min_size=1, max_size=40)
FASTA = ">sp|P1|ONE first protein\nMKT\nAYI\n\n>two\nGG\n"


def written(tmp_path, content, name="in.fasta"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_fasta_reads_the_same_in_every_packing_and_line_ending(tmp_path, pack, ending):
    path = written(tmp_path, pack(FASTA.replace("\n", ending).encode()))
    assert list(Fasta(path)) == [Protein("sp|P1|ONE", "MKTAYI"), Protein("two", "GG")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one record, got none in"),
        ("\n \n", "at least one record, got none in"),
        ("id,sequence\n1,MKT\n", "first line starts with '>', got 'id,sequence"),
        (bytes(range(256)), "expected a FASTA file"),
        (
            gzip.compress(FASTA.encode(), mtime=0)[:-12],
            "expected a file of sequences, got one that is broken or cut off",
        ),
        (
            lzma.compress(FASTA.encode())[:-12],
            "expected a file of sequences, got one that is broken or cut off",
        ),
        (">one\nMK\n>two\n>three\nMK\n", r"expected a sequence, got none, in record two \(line 3 of"),
        (">one\nMK\n>two\n*\n", r"expected a sequence, got none, in record two \(line 3 of"),
        (">one\nMK\n>\nMK\n", r"identifier after '>', got none, in record line 3 \(line 3 of"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(Fasta(written(tmp_path, content)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FASTA file at .*gone\.fasta, got nothing"):
        list(Fasta(tmp_path / "gone.fasta"))


@pytest.mark.parametrize(
    ("sequence", "expected", "stops", "unknown"),
    [
        ("mkt", "MKT", 0, 0),
        ("MKT*", "MKT", 1, 0),
        ("MK*T*", "MKXT", 1, 1),
        ("MJ-.T", "MXXXT", 0, 3),
        ("XBUZO", "XBUZO", 0, 0),
    ],
)
def test_letters_become_residues_and_changes_are_counted(sequence, expected, stops, unknown):
    corrections = Corrections()
    assert normalize(Protein("p", sequence), corrections).sequence == expected
    assert (corrections.stops, corrections.unknown) == (stops, unknown)


def test_one_warning_counts_all_changes():
    sequences = ["MKT*", "mj", "M-K.*"]
    with pytest.warns(
        UserWarning, match="was dropped: 2; letters that are no residue, read as X: 3"
    ) as caught:
        assert list(normalize_sequences(sequences)) == ["MKT", "MX", "MXKX"]
    assert len(caught) == 1


def test_strict_names_record_and_position():
    with pytest.raises(ValueError, match=r"got 'J' at position 3, in record P7"):
        normalize(Protein("P7", "MKJT"), Corrections(), strict=True)


def test_nothing_is_cut_unless_asked_and_cuts_are_counted():
    corrections = Corrections()
    assert len(normalize(Protein("long", "M" * 5000), corrections).sequence) == 5000
    assert normalize(Protein("long", "MKTAY"), corrections, max_length=3).sequence == "MKT"
    assert corrections.truncated == 1


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(LETTERS, min_size=1, max_size=5))
def test_tokens_equal_fair_esms_batch_converter(sequences):
    expected = ALPHABET.get_batch_converter()([(str(i), s) for i, s in enumerate(sequences)])[2]
    assert torch.equal(tokenize(sequences, ALPHABET), expected)
    assert torch.equal(is_residue(expected, ALPHABET).sum(1), torch.tensor([len(s) for s in sequences]))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    sequences = ["M" * length for length in lengths]
    batches = list(cut_batches(iter(sequences), budget))
    seen = sorted(item for batch in batches for item in batch)
    assert seen == list(enumerate(sequences))
    for batch in batches:
        padded = len(batch) * (2 + max(len(sequence) for _, sequence in batch))
        assert len(batch) == 1 or padded <= budget


def test_batches_of_a_stream_come_before_its_end():
    def endless():
        while True:
            yield "MKTAYI"

    assert len(next(cut_batches(endless(), 80))) == 10


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tokens_per_batch of at least 1, got 0"):
        list(cut_batches(["M"], 0))


def test_a_stream_of_records_begins_before_the_file_is_read(tmp_path):
    letters = random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=10_000 * 300)  # 2 MB packed
    records = (f">protein{i} of many\n{''.join(letters[300 * i : 300 * (i + 1)])}\n" for i in range(10_000))
    path = written(tmp_path, gzip.compress("".join(records).encode(), 1))
    file = Fasta(path)
    records = iter(file)
    assert next(records).identifier == "protein0"
    assert file.fraction < 0.2
    assert sum(1 for _ in records) == 9_999
    assert file.fraction == 1


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b"",
            b">",
            b">a\nMK\n",
            b"\x1f\x8b\x08",
            b"\xfd7zXZ\x00",
            b"BZh9",
            b"(\xb5/\xfd",
            b"\xef\xbb\xbf>a\nM",
        ]
    ),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, start):
    path = written(tmp_path_factory.mktemp("fuzz"), start + content)
    try:
        records = list(Fasta(path))
    except ValueError as error:
        assert str(error).startswith("expected")  # noqa: PT017  # either is right
    else:
        assert records
        assert all(record.identifier and record.sequence for record in records)


NASTY = {
    "a header of a megabyte": (b">" + b"a" * 2**20 + b"\nMK\n", ["MK"]),
    "a line of a megabyte": (b">a\n" + b"M" * 2**20 + b"\n", ["M" * 2**20]),
    "no line ending": (b">a\nMK", ["MK"]),
    "'>' within a header": (b">a >b\nMK\n", ["MK"]),
    "a gzip member and noise": (gzip.compress(b">a\nMK\n", mtime=0) + b"noise", None),
    "broken in the middle": (gzip.compress(b">a\nMK\n" * 1000, mtime=0)[:40] + b"\x00" * 40, None),
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_files_are_read_exactly_or_refused(tmp_path, name):
    content, expected = NASTY[name]
    path = written(tmp_path, content)
    if expected is None:
        with pytest.raises(ValueError, match="expected a file of sequences, got one that is broken"):
            list(Fasta(path))
    else:
        assert [record.sequence for record in Fasta(path)] == expected


@pytest.mark.parametrize("command", ["embed", "fit"])
def test_letters_are_read_once_from_a_file_to_the_model(tmp_path, monkeypatch, command):
    read = []

    def counting(text, *others, **options):
        read.append(text)
        return read_residues(text, *others, **options)

    monkeypatch.setattr("rd_torch.sequences.read_residues", counting)
    written = [f"M{'K' * length}jt" for length in range(3, 40)]
    (tmp_path / "in.fasta").write_text("".join(f">{place}\n{text}\n" for place, text in enumerate(written)))
    arguments = [command, str(tmp_path / "in.fasta"), "-o", str(tmp_path / "out.h5")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read == written
