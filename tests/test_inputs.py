"""Every file in `inputs/` gives exactly what `inputs/table.json` says, at every door."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_torch
from rd_torch.cli import main
from rd_torch.cluster import Records
from rd_torch.letters import Corrections
from rd_torch.reading import Proteins
from rd_torch.sequences import Entry, normalize_entries
from rd_torch.store import Names, open_store

FOLDER = Path(__file__).parent / "inputs"
TABLE = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
READ = [case for case in TABLE if not isinstance(case["expected"][0], str)]
REFUSED = [case for case in TABLE if isinstance(case["expected"][0], str)]
WITH_UNKNOWN_LETTERS = ("stops.fasta", "aligned.fasta", "rare.fasta")
FASTA = [case for case in READ if case["file"].split(".")[1] not in ("csv", "tsv", "parquet")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:guessed for"),
    pytest.mark.filterwarnings("ignore:letters that are no residue"),
    pytest.mark.filterwarnings("ignore:sequences whose"),
    pytest.mark.filterwarnings("ignore:records whose identifier"),
]


def cases(given):
    return pytest.mark.parametrize("case", given, ids=[f"{case['file']}: {case['why']}" for case in given])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    model.save_pretrained(folder)
    return str(folder)


def sound(case):
    """The records that are read."""
    return [tuple(each) for each in case["expected"] if len(each) == 2]


def faults(case):
    """The records that are not, with line and reason."""
    return [tuple(each) for each in case["expected"] if len(each) == 3]


def read(proteins, **options):
    """What comes of a source: records, and faults with lines and reasons."""
    entries = list(normalize_entries(proteins.entries(), Corrections(), **options))
    good = [(entry.identifier, entry.sequence) for entry in entries if not entry.fault]
    return good, [(entry.identifier, entry.line, entry.fault) for entry in entries if entry.fault]


def assert_faults(found, case):
    assert [each[:2] for each in found] == [each[:2] for each in faults(case)]
    for (_, _, reason), (_, _, expected) in zip(found, faults(case), strict=True):
        assert expected in reason


def test_every_file_of_the_corpus_is_in_the_table():
    assert {case["file"] for case in TABLE} == {each.name for each in FOLDER.iterdir()} - {"table.json"}
    assert len(TABLE) > 80


@cases(READ)
def test_a_file_gives_these_records_and_these_faults(case):
    good, bad = read(Proteins(FOLDER / case["file"]))
    assert good == sound(case)
    assert_faults(bad, case)


@cases(FASTA)
def test_the_first_fault_ends_a_plain_iteration_with_file_and_line(case):
    file = rd_torch.Fasta(FOLDER / case["file"])
    bad = [entry for entry in file.entries() if entry.fault]
    if bad:
        with pytest.raises(ValueError, match=f"line {bad[0].line:,} of .*{case['file']}"):
            list(file)
    else:
        assert [each.identifier for each in file] == [each[0] for each in case["expected"]]


@cases(REFUSED)
def test_a_file_that_is_none_is_refused_with_the_reason(case, model, checkpoint, tmp_path):
    path = FOLDER / case["file"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
        list(Proteins(path).entries())
    assert str(caught.value).startswith("expected")
    assert case["expected"][0] in str(caught.value)
    assert case["file"] in str(caught.value)
    with pytest.raises(ValueError, match="expected"):
        rd_torch.embed_to_store(model, Proteins(path), tmp_path / "out.h5")
    result = CliRunner().invoke(
        main, ["embed", str(path), "-o", str(tmp_path / "o.h5"), "--model", checkpoint]
    )
    assert result.exit_code == 1
    assert case["expected"][0] in result.stderr.splitlines()[-1]
    assert not (tmp_path / "o.h5").exists()


def expected_vectors(model, case):
    """Each record embedded alone, by its name in a store, and the names of the faults."""
    names = Names(str)
    vectors, failed = {}, []
    for each in case["expected"]:
        name = names.take(each[0])
        if len(each) == 2:
            vectors[name] = rd_torch.embed(model, [each[1]])[0]
        else:
            failed.append(name)
    return vectors, failed


def assert_store(path, model, case):
    vectors, failed = expected_vectors(model, case)
    with open_store(path) as store:
        assert list(store) == list(vectors)
        for name, vector in vectors.items():
            np.testing.assert_allclose(store[name], vector, atol=2e-5)
    listed = path.with_name(f"{path.name}.failed.tsv")
    assert listed.exists() == bool(failed)
    if failed:
        with listed.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t"))
        assert [row["identifier"] for row in rows] == failed
        assert [int(row["line"]) for row in rows] == [line for _, line, _ in faults(case)]
        for row, (_, _, reason) in zip(rows, faults(case), strict=True):
            assert reason in row["reason"]
            assert row["residues"] == "0"


@cases(READ)
def test_a_store_of_a_file_has_these_records_and_lists_the_others(case, model, tmp_path):
    path = FOLDER / case["file"]
    failures = rd_torch.embed_to_store(model, Proteins(path), tmp_path / "out.parquet")
    assert list(failures) == expected_vectors(model, case)[1]
    assert all(failure.source == str(path) for failure in failures.values())
    assert_store(tmp_path / "out.parquet", model, case)
    again = rd_torch.embed_to_store(model, Proteins(path), tmp_path / "out.parquet")
    assert again == failures, "done is done, and the list is read again"


@pytest.mark.parametrize("door", ["file", "standard input"])
@cases(READ)
def test_the_command_embeds_the_same_and_its_status_tells(case, door, model, checkpoint, tmp_path):
    path = FOLDER / case["file"]
    source = str(path) if door == "file" else "-"
    command = ["embed", source, "-o", str(tmp_path / "out.h5"), "--model", checkpoint]
    result = CliRunner().invoke(main, command, input=path.read_bytes() if source == "-" else None)
    assert result.exit_code == (3 if faults(case) else 0), result.output
    assert_store(tmp_path / "out.h5", model, case)
    strict = [*command[:3], str(tmp_path / "strict.h5"), *command[4:], "--strict"]
    result = CliRunner().invoke(main, strict, input=path.read_bytes() if source == "-" else None)
    refused = bool(faults(case)) or case["file"] in WITH_UNKNOWN_LETTERS
    assert result.exit_code == refused, result.output
    if refused:
        assert result.stderr.splitlines()[-1].startswith("Error: expected")


@cases(READ)
def test_a_cluster_reads_the_same(case):
    windows = [window for window, _ in Records(FOLDER / case["file"]).windows(10_000, Names(str))]
    good = [
        letters for window in windows for k, letters in enumerate(window.contents) if k not in window.faults
    ]
    assert good == [letters for _, letters in sound(case)]
    lines = [window.origins[k][1] for window in windows for k in sorted(window.faults)]
    assert lines == [line for _, line, _ in faults(case)]
    known = [known for _, known in Records(FOLDER / case["file"]).windows(10_000)]
    lost = [Entry(*entry) for each in known for entry in json.loads(each["left_out"])]
    if sound(case):
        assert [entry.line for entry in lost] == [line for _, line, _ in faults(case)]


def test_a_pipe_and_process_substitution_are_read(checkpoint, model, tmp_path):
    command = f"'{sys.executable}' -m rd_torch.cli embed <(cat '{FOLDER}/plain.fasta' | gzip) - -o out.h5 "
    subprocess.run(
        ["bash", "-c", f"cat '{FOLDER}/rare.fasta' | {command} --model '{checkpoint}'"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["p1", "p2", "p1#2"]


def test_what_was_begun_from_a_pipe_goes_on_with_the_same_proteins_piped_again(checkpoint, tmp_path):
    command = ["embed", "-", "-o", str(tmp_path / "out.h5"), "--model", checkpoint]
    text = (FOLDER / "plain.fasta").read_bytes()
    result = CliRunner().invoke(main, command, input=text)
    assert "If this is interrupted, pipe the same ones in again." in result.stderr
    assert CliRunner().invoke(main, command, input=text).exit_code == 0
    other = CliRunner().invoke(main, command, input=text.replace(b"MQIF", b"MQIY"))
    assert other.exit_code == 1
    assert "got others" in other.stderr.splitlines()[-1]


def test_several_files_and_folders_are_one_input(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.fa.gz", "a.fasta", "ignored.txt", ".hidden.fasta", "c.csv", "out.h5.failed.tsv"):
        source = "table.csv" if name == "c.csv" else "plain.fasta"
        (folder / name).write_bytes((FOLDER / source).read_bytes())
    result = CliRunner().invoke(
        main,
        [
            "embed",
            str(folder),
            str(FOLDER / "joined.fasta"),
            "-o",
            str(tmp_path / "out.h5"),
            "--model",
            checkpoint,
        ],
    )
    assert result.exit_code == 3, result.output
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["p1", "p2", "p1#2", "p2#2", "p1#3", "p2#3", "p0", "p3"]
    rows = (tmp_path / "out.h5.failed.tsv").read_text().splitlines()
    assert [row.split("\t")[::3] for row in rows[1:]] == [
        ["p1#4", str(FOLDER / "joined.fasta")],
        ["p2#4", str(FOLDER / "joined.fasta")],
    ]
    assert [row.split("\t")[4] for row in rows] == ["line", "3", "4"]


def test_a_file_that_cannot_be_read_ends_the_command_before_others_are_embedded(checkpoint, tmp_path):
    for bad in ("archive.zip", "bare.fasta", "cut_off.gz", "cut_off.xz", "nothing.fasta", "only_blank.fasta"):
        files = [str(FOLDER / "plain.fasta"), str(FOLDER / bad)]
        out = tmp_path / f"{bad}.h5"
        result = CliRunner().invoke(main, ["embed", *files, "-o", str(out), "--model", checkpoint])
        assert result.exit_code == 1
        assert bad in result.stderr.splitlines()[-1]
        assert not list(tmp_path.glob(f"{bad}.h5.part/windows/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.fasta"], "expected a file of sequences at gone.fasta, got nothing there"),
        (["."], "expected a folder with files that end in"),
        (["-", "--cluster"], "got standard input or a pipe: write it to a file first"),
        ([str(FOLDER / "plain.fasta"), "--identifier", "("], "word, header, uniprot or a regular expression"),
        (
            [str(FOLDER / "table.csv"), "--sequence-column", "letters"],
            "expected a column 'letters', got 'id', 'seq",
        ),
        (
            [str(FOLDER / "plain.fasta"), "--windows", "10,x"],
            "expected --windows as LENGTH or LENGTH,OVERLAP",
        ),
        (
            [str(FOLDER / "plain.fasta"), "--windows", "10,10"],
            "overlap from 0 to below their length, got 10 with 10",
        ),
    ],
)
def test_wrong_sources_are_said_in_a_sentence(arguments, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["embed", *arguments, "-o", "out.h5", "--model", checkpoint])
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]


def test_a_column_of_other_sequences_gives_no_names(tmp_path):
    """`protein` is how a column of names may be called, but not one that holds sequences."""
    path = tmp_path / "in.csv"
    path.write_text("gene,cds,protein\nyaaA,ATGAAAGTTCTG,MKVLMKVLMKVL\nyaaB,ATGAAAACCCTG,MKTMKTMKTMKT\n")
    good, bad = read(Proteins(path, sequence_column="protein"))
    assert (good, bad) == ([("yaaA", "MKVLMKVLMKVL"), ("yaaB", "MKTMKTMKTMKT")], [])
    good, bad = read(Proteins(path, sequence_column="cds"))
    assert (good, bad) == ([("yaaA", "ATGAAAGTTCTG"), ("yaaB", "ATGAAAACCCTG")], [])
    with pytest.raises(ValueError, match=r"'cds' and 'protein' can be meant"):
        list(Proteins(path).entries())


HEADER = ">sp|P69905|HBA_HUMAN Hemoglobin subunit alpha OS=Homo sapiens"


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (None, "sp|P69905|HBA_HUMAN"),
        ("word", "sp|P69905|HBA_HUMAN"),
        ("header", HEADER[1:]),
        ("uniprot", "P69905"),
        (r"\|(\w+)_HUMAN", "HBA"),
        (r"OS=.*", "OS=Homo sapiens"),
    ],
)
def test_the_identifier_is_what_the_rule_finds(rule, name, checkpoint, tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(f"{HEADER}\nMKV\n")
    assert [each.identifier for each in rd_torch.Fasta(path, identifier=rule)] == [name]
    command = ["embed", str(path), "-o", str(tmp_path / "out.h5"), "--model", checkpoint]
    result = CliRunner().invoke(main, command + (["--identifier", rule] if rule else []))
    assert result.exit_code == 0, result.output
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == [name]


def test_a_header_in_which_the_rule_finds_nothing_is_left_out(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(f"{HEADER}\nMKV\n>mine of old\nMKL\n")
    good, bad = read(Proteins(path, identifier="uniprot"))
    assert good == [("P69905", "MKV")]
    assert bad[0][:2] == ("mine", 3)
    assert "expected a header in which" in bad[0][2]


def test_files_of_fair_esms_format_are_named_by_the_whole_header(model, tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(">ESMFOLD V0 PREDICTION FOR A\nMKV\n>ESMFOLD V0 PREDICTION FOR B\nMKL\n")
    rd_torch.embed_to_store(model, rd_torch.Fasta(path), tmp_path / "out.pt")
    with open_store(tmp_path / "out.pt") as store:
        assert list(store) == ["ESMFOLD V0 PREDICTION FOR A", "ESMFOLD V0 PREDICTION FOR B"]
    assert (tmp_path / "out.pt" / "ESMFOLD V0 PREDICTION FOR A.pt").is_file()
    rd_torch.embed_to_store(model, rd_torch.Fasta(path, identifier="word"), tmp_path / "word.pt")
    with open_store(tmp_path / "word.pt") as store:
        assert list(store) == ["ESMFOLD", "ESMFOLD#2"]
    rd_torch.embed_to_store(model, rd_torch.Fasta(path), tmp_path / "out.h5")
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["ESMFOLD", "ESMFOLD#2"]


def test_a_fit_leaves_out_and_lists_what_cannot_be_read(checkpoint, tmp_path):
    command = ["fit", str(FOLDER / "joined.fasta"), "-o", str(tmp_path / "chain"), "--backbones", checkpoint]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 3, result.output
    model = rd_torch.RDModel.from_pretrained(tmp_path / "chain")
    assert model.config.provenance["fit"]["sequences"] == 2
    rows = (tmp_path / "chain.failed.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == ["identifier", "p1", "p2"]
    strict = CliRunner().invoke(main, [*command, "--strict"])
    assert strict.exit_code == 1


BLANK = " \t\n\r\v\f\u00a0"


def second_parser(text):
    """Another reading of FASTA, sign by sign: names and letters, letters None where a record is left out.

    None where the file is refused.
    """
    records, doubtful = [], set()
    for line in re.split("\r\n|\r|\n", text):
        core = line.strip(BLANK + "\ufeff")
        if core[:1] in ("", ";", "#", "!"):
            continue
        if core[0] == ">":
            records.append((core[1:], []))
            continue
        if not records:
            return None
        before, mark, behind = core.partition(">")
        records[-1][1].append(core)
        if mark and all((sign.isascii() and sign.isalpha()) or sign in BLANK + "-.*" for sign in before):
            doubtful.add(len(records) - 1)
            records.append((behind, []))
            doubtful.add(len(records) - 1)
    if not records:
        return None
    read = []
    for number, (header, lines) in enumerate(records):
        words = header.strip(BLANK + "\ufeff").replace("\x01", " ").split()
        letters = "".join(sign for line in lines for sign in line if sign not in BLANK)
        left_out = number in doubtful or not words or is_pir(words) or not letters.strip("*")
        left_out |= any(not (sign.isascii() and sign.isalpha()) and sign not in "-.*" for sign in letters)
        left_out |= letters in ("nan", "NaN", "None", "none", "null", "Null", "NA", "NULL")
        left_out |= any(has_words(line) for line in lines)
        read.append((words[0] if words else None, None if left_out else as_residues(letters)))
    return read


def is_pir(words):
    return re.match("(P1|F1|DL|DC|RL|RC|N1|N3|XX);", words[0]) is not None


def has_words(line):
    sizes = [len(piece) for piece in re.split(f"[{BLANK}]+", line.strip(BLANK))]
    uneven = len(set(sizes[:-1])) > 1 or (len(sizes) > 1 and sizes[-1] > sizes[0])
    return uneven and any("a" <= sign <= "z" for sign in line)


def as_residues(letters):
    stripped = letters.upper()
    stripped = stripped[:-1] if stripped[-1] == "*" else stripped
    return "".join(sign if sign in "LAGVSERTIDPKQNFYMHWCXBUZO" else "X" for sign in stripped)


SIGNS = "ACDEFGHIKLMNPQRSTVWYXBUZOJacmkt-.*;#!>1<&\u00e9\u00df\u0131\u200b\x00\x01\x1c\x0b\u00a0\ufeff \t"
NOISE = st.text(SIGNS, max_size=30)
LETTERS = st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=20)
HEADERS = st.builds(lambda name, rest: f">{name} {rest}", st.text("ab|1;P", max_size=5), NOISE)
LINES = st.lists(
    HEADERS | LETTERS | NOISE | st.just("") | st.sampled_from(["nan", "NA", "P1;x", "Mk aV"]), max_size=12
)


@settings(derandomize=True, deadline=None, max_examples=1_000)
@given(LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_any_text_gives_the_records_of_a_second_parser_or_an_error(tmp_path_factory, lines, ending, ends):
    text = ending.join(lines) + ending * ends
    path = tmp_path_factory.mktemp("fuzz") / "in"
    path.write_bytes(text.encode())
    expected = second_parser(text.removeprefix("\ufeff"))
    try:
        entries = list(normalize_entries(rd_torch.Fasta(path).entries(), Corrections()))
    except ValueError as error:
        assert str(error).startswith("expected")  # noqa: PT017  # either is right
        assert expected is None
    else:
        assert expected is not None
        assert [entry.sequence or None for entry in entries] == [letters for _, letters in expected]
        assert all(entry.fault for entry in entries if not entry.sequence)
        names = [(entry.identifier, name) for entry, (name, _) in zip(entries, expected, strict=True)]
        assert all(ours == theirs for ours, theirs in names if theirs is not None)
