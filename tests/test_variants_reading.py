"""How variants are written, and what is refused with which reason."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rd_torch.variants import (
    AMINO_ACIDS,
    AllSingle,
    Variant,
    VariantTable,
    all_single,
    compare_sequence,
    read_notation,
    read_variant,
    read_wild_type,
)
from rd_torch.variants.notation import THREE_LETTERS

WILD = "MKVLAYGHWCDEFIRNPQST"


def sites_of(text, wild_type=WILD, first=1):
    return [tuple(each) for each in read_variant(text, wild_type, first).substitutions]


K2R, V3I = (1, "K", "R"), (2, "V", "I")


@pytest.mark.parametrize(
    "text",
    ["K2R", "k2r", " K2R ", "Lys2Arg", "LYS2ARG", "p.K2R", "p.Lys2Arg", "p.(Lys2Arg)", "p.[Lys2Arg]",
     "NP_000305.3:p.Lys2Arg", "NP_000305.3(PTEN):p.(Lys2Arg)", "K02R", "K2R:V3V", "K2Arg"],
)  # fmt: skip
def test_one_substitution_however_it_is_written(text):
    assert sites_of(text) == [K2R]


@pytest.mark.parametrize(
    "text",
    ["K2R:V3I", "V3I:K2R", "K2R,V3I", "K2R, V3I", "K2R;V3I", "K2R/V3I", "K2R_V3I", "K2R+V3I", "K2R V3I",
     "p.[Lys2Arg;Val3Ile]", "p.[(Lys2Arg);(Val3Ile)]", "p.[(Lys2Arg;Val3Ile)]", "p.K2R;p.V3I",
     "NP_000305.3:p.[Lys2Arg;Val3Ile]", "p.Lys2Arg:p.Val3Ile", "K2R:p.Val3Ile"],
)  # fmt: skip
def test_several_substitutions_however_they_are_separated(text):
    assert sites_of(text) == [K2R, V3I]


@pytest.mark.parametrize(
    "text",
    ["WT", "wt", "_wt", "_sy", "=", "p.=", "p.(=)", "wild-type", "p.Lys2=", "p.(Lys2=)", "K2=", "K2K",
     "Lys2Lys", "NP_000305.3:p.=", "K2K:V3V"],
)  # fmt: skip
def test_the_wild_type_and_synonymous_changes_change_nothing(text):
    assert sites_of(text) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a variant, got ''"),
        ("NA", "expected a variant, got 'NA'"),
        ("nan", "expected a variant"),
        ("p.Lys2Ter", "got a stop"),
        ("K2*", "got a stop"),
        ("p.Lys2*", "got a stop"),
        ("Ter21Lys", "got a stop"),
        ("K2X", "got X, which is unknown, or a stop in old tables"),
        ("p.Lys2Xaa", "got X"),
        ("K2B", "got B, which is none"),
        ("K2Z", "got Z, which is none"),
        ("p.Lys2?", r"got \?, which is none"),
        ("K2J", "expected letters of amino acids, got J"),
        ("K2del", "got a deletion: 'K2del'"),
        ("K2-", "got a deletion"),
        ("p.Lys2_Val3del", "got a deletion"),
        ("p.Lys2_Val3insGly", "got an insertion"),
        ("p.Lys2_Val3delinsGly", "got a deletion with an insertion"),
        ("p.Lys2dup", "got a duplication"),
        ("p.Arg2ProfsTer23", "got a frameshift"),
        ("p.Lys2fs", "got a frameshift"),
        ("p.Ter21GlnextTer17", "got an extension of the protein"),
        ("p.Lys2[5]", "got a repeat"),
        ("c.76A>T", "expected a variant of a protein, got one of DNA or RNA: 'c.76A>T'"),
        ("NM_000314.8:c.76A>T", "got one of DNA or RNA"),
        ("p.[Lys2Arg];[Val3Ile]", "may be on two chromosomes"),
        ("p.Lys2Arg(;)Val3Ile", "may be on two chromosomes"),
        ("p.0", "expected substitutions such as A24G or Ala24Gly, got '0' in 'p.0'"),
        ("2R", "got '2R'"),
        ("KR", "got 'KR'"),
        ("K2.0R", "got 'K2.0R'"),
        ("K2RV3I", "got 'K2RV3I'"),
        ("K2R:", "got '' in 'K2R:'"),
        ("K2R|V3I", "may be on two"),
        ("Foo2Arg", "expected the three letters of an amino acid, got 'Foo'"),
        ("DEL2ARG", "got 'DEL'"),
        ("K2R:V3Ter", "got a stop"),
        ("0.75", "got '0.75'"),
    ],
)
def test_what_is_no_substitution_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        read_variant(text, WILD)


@pytest.mark.parametrize(
    ("text", "first", "reason"),
    [
        ("A2R", 1, "expected K at position 2, where the wild type has it, got A: 'A2R'"),
        ("A2A", 1, "expected K at position 2"),
        ("p.Ala2=", 1, "expected K at position 2"),
        ("K2R:A3I", 1, "expected V at position 3, where the wild type has it, got A: 'K2R:A3I'"),
        ("A25R", 24, "expected K at position 25, where the wild type has it, got A: 'A25R'"),
        ("K2R", 24, "expected a position from 24 to 43, which the wild type has, got 2: 'K2R'"),
        ("K0R", 1, "expected a position from 1 to 20, which the wild type has, got 0: 'K0R'"),
        ("K20R", 0, "expected a position from 0 to 19, which the wild type has, got 20: 'K20R'"),
        ("K-1R", 1, "got -1"),
        ("K2R:K2I", 1, "expected each position once, got 2 twice: 'K2R:K2I'"),
        ("K2R:K2R", 1, "expected each position once, got 2 twice"),
        ("A21X", 1, "got X, which is unknown"),
    ],
)
def test_what_does_not_fit_the_wild_type_is_refused_by_the_users_own_numbers(text, first, reason):
    with pytest.raises(ValueError, match=reason):
        read_variant(text, WILD, first)


def test_an_earlier_variant_is_never_taken_for_an_accession():
    accessions = ("NP_1.1", "NP_000305.3(PTEN)", "ENSP00000361021.3", "LRG_199p1", "P60484", "A0A024R1R8-2")
    assert [read_notation(f"{each}:p.V3I").reference for each in accessions] == list(accessions)
    assert len(read_notation("K2R:p.V3I").changes) == 2
    for text in ("K2R:A:p.V3I", "K2:p.V3I", "Lys2:p.V3I", "P2:p.V3I", "PTEN:p.V3I"):
        with pytest.raises(ValueError, match="expected substitutions such as"):
            read_notation(text)


@pytest.mark.parametrize("letter", ["X", "B", "Z"])
def test_an_unknown_letter_of_the_wild_type_is_nothing_to_compare_with(letter):
    message = f"expected an amino acid of the wild type at position 24, got {letter}"
    with pytest.raises(ValueError, match=message):
        read_variant(f"{letter}24A", f"{letter}KV", 24)
    with pytest.raises(ValueError, match=message):
        compare_sequence("AKV", f"{letter}KV", "", 24)
    assert read_variant(f"{letter}24=", f"{letter}KV", 24).substitutions == ()
    assert read_variant("K2U", "MKV").substitutions == ((1, "K", "U"),)


@pytest.mark.parametrize(("first", "text"), [(0, "K1R"), (1, "K2R"), (24, "K25R"), (-3, "K-2R")])
def test_numbering_moves_the_positions(first, text):
    assert sites_of(text, first=first) == [K2R]


@given(st.data())
def test_what_is_written_is_read_back(data):
    wild = data.draw(st.text(AMINO_ACIDS, min_size=1, max_size=30))
    first = data.draw(st.integers(-50, 400))
    sites = data.draw(st.sets(st.integers(0, len(wild) - 1), min_size=1))
    new = {site: data.draw(st.sampled_from([a for a in AMINO_ACIDS if a != wild[site]])) for site in sites}
    three = {one: name.capitalize() for name, one in THREE_LETTERS.items()}
    short = [f"{wild[site]}{site + first}{new[site]}" for site in sites]
    long = [f"{three[wild[site]]}{site + first}{three[new[site]]}" for site in sites]
    mutated = "".join(new.get(site, letter) for site, letter in enumerate(wild))
    one = read_variant(data.draw(st.sampled_from(":,;/_+ ")).join(short), wild, first)
    other = read_variant(f"p.[{';'.join(long)}]", wild, first)
    assert one.substitutions == other.substitutions == compare_sequence(mutated, wild, "").substitutions
    assert one.mutate(wild) == mutated
    assert one.sites == tuple(sorted(sites))


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        (WILD[:-1], "expected 20 residues, as the wild type has, got 19: deletions have no score here"),
        (WILD + "A", "got 21: insertions have no score"),
        ("X" + WILD[1:], "expected an amino acid at position 24, got X"),
        (WILD[:3] + "*" + WILD[4:], r"got '\*' at position 4"),
        ("", "expected a sequence, got none"),
    ],
)
def test_a_whole_sequence_that_is_no_substitution_is_refused(sequence, reason):
    with pytest.raises(ValueError, match=reason):
        compare_sequence(sequence, WILD, "", first=24)


@pytest.mark.parametrize("sequence", ["MK-V", "MKJV", "MK*V", "", "MKV1"])
def test_a_wild_type_has_residues_alone(sequence):
    with pytest.raises(ValueError, match="expected"):
        read_wild_type(sequence)


def test_a_wild_type_is_read_as_people_write_it():
    assert read_wild_type("mkv lay\nGH") == "MKVLAYGH"


def test_all_single_is_every_substitution_once():
    found = list(all_single("MKX", first=24))
    assert len(found) == len({each.name for each in found}) == 19 + 19
    assert [each.mutate("MKX") for each in found] == [
        compare_sequence(each.mutate("MKX"), "MKX", "").mutate("MKX") for each in found
    ]
    assert found[0].name == "M24A"
    assert all(read_variant(each.name, "MKX", 24) == each for each in found)
    assert [row.variant for row in AllSingle("MKX", 24)] == found


# Tables


def write(path, *lines):
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path, wild_type=WILD, **options):
    return list(VariantTable(path, wild_type, **options))


def texts(rows):
    return [row.name if row.variant is not None else row.fault for row in rows]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("gym.csv", ["mutant,mutated_sequence,DMS_score", f"K2R,MR{WILD[2:]},1", f"V3I,MKI{WILD[3:]},2"]),
        ("mave.csv", ["accession,hgvs_nt,hgvs_pro,score", "u#1,NA,p.Lys2Arg,1", "u#2,NA,p.Val3Ile,2"]),
        ("old.csv", ["# Accession: urn:1", "#", "hgvs_pro,score", "p.Lys2Arg,1", "p.Val3Ile,2"]),
        ("tabs.tsv", ["Protein change\tscore", "K2R\t1", "V3I\t2"]),
        ("semicolons.csv", ["variant;score", "K2R;1", "V3I;2"]),
        ("one.txt", ["mutation", "K2R", "", "V3I"]),
        ("packed.csv.gz", ["Mutations,score", "K2R,1", "V3I,2"]),
        ("mark.csv", ["\ufeffmutant,score", "K2R,1", "V3I,2"]),
        ("whole.csv", ["sequence,score", f"MR{WILD[2:]},1", f"MKI{WILD[3:]},2"]),
    ],
)
def test_tables_are_read_as_they_are_found(tmp_path, name, lines):
    rows = read(write(tmp_path / name, *lines))
    assert [row.variant.substitutions for row in rows] == [(K2R,), (V3I,)]
    assert [len(row.cells) for row in rows] == [len(VariantTable(tmp_path / name, WILD).header)] * 2


def test_several_substitutions_may_stand_between_the_tables_own_delimiters(tmp_path):
    path = write(tmp_path / "a.csv", "mutant,score", '"K2R,V3I",1', "K2R;V3I,2")
    assert [row.variant.substitutions for row in read(path)] == [(K2R, V3I)] * 2


@pytest.mark.parametrize("packed", [False, True])
def test_parquet_is_read_with_row_numbers(tmp_path, packed):
    table = pa.table({"mutant": ["K2R", None, "A2R"], "score": [0.5, 1.0, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    if packed:
        whole = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(gzip.compress(whole))
    rows = read(tmp_path / "a.parquet")
    assert texts(rows) == [
        "K2R",
        "expected a variant, got ''",
        "expected K at position 2, where the wild type has it, got A: 'A2R'",
    ]
    assert [(row.line, list(row.cells)) for row in rows] == [
        (1, ["K2R", "0.5"]),
        (2, ["", "1.0"]),
        (3, ["A2R", ""]),
    ]


def test_every_row_is_there_and_says_why_it_cannot_be_read(tmp_path):
    path = write(tmp_path / "a.csv", "mutant,score", "K2R,1", "K2del,2", "A2R,3", "V3I", ",5", "V3I,6")
    rows = read(path)
    assert texts(rows) == [
        "K2R",
        "expected substitutions alone, got a deletion: 'K2del'",
        "expected K at position 2, where the wild type has it, got A: 'A2R'",
        "expected 2 columns, as in the header row, got 1",
        "expected a variant, got ''",
        "V3I",
    ]
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 7]


def test_a_sequence_beside_a_variant_must_be_its_own(tmp_path):
    lines = ["mutant,mutated_sequence", f"K2R,MR{WILD[2:]}", f"K2R,MKI{WILD[3:]}", f"K2R,{WILD[1:]}"]
    rows = read(write(tmp_path / "a.csv", *lines))
    assert texts(rows) == [
        "K2R",
        "expected the sequence in 'mutated_sequence' to be that of 'K2R', got that of 'V3I'",
        "expected 20 residues, as the wild type has, got 19: deletions have no score here",
    ]


def test_a_table_of_two_proteins_is_one_of_the_first(tmp_path):
    path = write(tmp_path / "a.csv", "hgvs_pro", "NP_1.1:p.Lys2Arg", "p.Val3Ile", "NP_2.1:p.Lys2Arg")
    assert texts(read(path)) == [
        "NP_1.1:p.Lys2Arg",
        "p.Val3Ile",
        "expected a variant of NP_1.1, as in rows before, got one of NP_2.1: 'NP_2.1:p.Lys2Arg'",
    ]


def test_variants_from_sequences_get_their_usual_names(tmp_path):
    path = write(tmp_path / "a.csv", "seq,y", f"MRI{WILD[3:]},1", f"{WILD},2")
    assert texts(read(path, sequence_column="seq", first=24)) == ["K25R:V26I", "WT"]


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("mutant,variant", {}, "which can both be meant: name it with --mutation-column"),
        (
            "name,score",
            {},
            "expected a column of variants such as 'mutant' or 'hgvs_pro', got 'name', 'score'",
        ),
        ("mutant,mutant", {}, "expected columns of different names"),
        ("mutant,score", {"mutation_column": "x"}, "expected a column 'x', got 'mutant', 'score'"),
        ("mutant,score", {"sequence_column": "x"}, "expected a column 'x'"),
        ("mutant,s", {"mutation_column": "mutant", "sequence_column": "s"}, "got both"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(tmp_path, header, options, message):
    with pytest.raises(ValueError, match=message):
        VariantTable(write(tmp_path / "a.csv", header, "K2R,1"), WILD, **options)


def test_a_named_column_is_read_whatever_it_is_called(tmp_path):
    path = write(tmp_path / "a.csv", "mutant,mine", "V3I,K2R")
    (row,) = read(path, mutation_column="mine")
    assert row.variant.substitutions == (K2R,)


def test_no_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a table of variants at .*, got nothing there"):
        VariantTable(tmp_path / "none.csv", WILD)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="got no row in"):
        VariantTable(tmp_path / "empty.csv", WILD)
    with pytest.raises(ValueError, match="does not read in line 2"):
        read(write(tmp_path / "quotes.csv", "mutant,score", '"K2R,1'))


@pytest.mark.parametrize("first", [0, 24, 100])
def test_the_offset_that_fits_all_rows_is_found(tmp_path, first):
    rows = [each.name for each in all_single(WILD, first)][::7]
    table = VariantTable(write(tmp_path / "a.csv", "mutant", *rows), WILD)
    assert table.hint() == (
        f": they fit where the wild type's first residue has number {first}, which is --offset {first - 1} "
        "without --zero-based"
    )


def test_no_offset_is_named_where_none_or_several_fit(tmp_path):
    assert VariantTable(write(tmp_path / "a.csv", "mutant", "A5G"), "AAAA").hint() == ""
    assert VariantTable(write(tmp_path / "b.csv", "mutant", "W5G", "K6R"), "MKV").hint() == ""


@pytest.mark.parametrize(("wrong", "found"), [(1, True), (3, False)])
def test_the_offset_is_found_although_some_letters_are_wrong_and_others_fit_by_chance(tmp_path, wrong, found):
    rows = [each.name for each in all_single(WILD, 3)][::19][:10]
    rows[:wrong] = [f"{'A' if each[0] != 'A' else 'C'}{each[1:-1]}D" for each in rows[:wrong]]
    assert bool(VariantTable(write(tmp_path / "a.csv", "mutant", *rows), WILD).hint()) is found
    assert VariantTable(tmp_path / "a.csv", WILD, first=3).hint() == ""


def test_the_data_at_hand_fit_their_wild_types(data):
    from rd_torch import Fasta

    for wild in Fasta(data / "dms" / "wild_types.fasta"):
        table = VariantTable(data / "dms" / f"{wild.identifier}.csv.gz", wild.sequence)
        first = [row for row, _ in zip(table, range(300), strict=False)]
        assert all(isinstance(row.variant, Variant) for row in first)
        place = table.header.index("num_mutations")
        assert [len(row.variant.sites) for row in first] == [int(row.cells[place]) for row in first]
