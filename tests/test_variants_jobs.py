"""Tables of scores, killed runs, heat maps and embeddings of variants, and the command for all of them."""

import csv

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_sequence

import rd_torch
from rd_torch import RDModel, open_store
from rd_torch.cli import main
from rd_torch.disk import take_lock
from rd_torch.variants import SCORINGS, Substitution, Variant, all_single, asking, read_variant
from rd_torch.variants.heatmap import ORDER

WILD = random_sequence(24, seed=3)
SINGLE = [each.name for each in all_single(WILD)][::9]
SEVERAL = [":".join(SINGLE[place::17]) for place in range(4)]
VARIANTS = [*SINGLE, *SEVERAL, "WT"]
LEVELS = ["28K", "90K", "207K", "1M"]


@pytest.fixture(scope="module")
def shipped():
    return RDModel.from_pretrained("esm2-rd-mini")


def run(*arguments):
    return CliRunner().invoke(main, ["variants", *map(str, arguments)])


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "assay.csv"
    path.write_text("mutant,score\n" + "".join(f"{each},{place}\n" for place, each in enumerate(VARIANTS)))
    return path


def column(path, name):
    with path.open(newline="") as handle:
        return [row[name] for row in csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")]


@pytest.mark.parametrize("scoring", SCORINGS[:3])
def test_the_command_writes_what_python_gives(tmp_path, shipped, table, scoring):
    output = tmp_path / "scores.csv"
    result = run(table, "--sequence", WILD, "-o", output, "--scoring", scoring, "--level", "all")
    assert result.exit_code == 0, result.stderr
    assert f"Scoring {scoring}: " in result.stderr
    expected = rd_torch.score_variants(shipped, WILD, VARIANTS, scoring=scoring, levels=LEVELS)
    assert column(output, "mutant") == VARIANTS
    assert column(output, "score") == [str(place) for place in range(len(VARIANTS))]
    for level in LEVELS:
        got = np.array([float(each) for each in column(output, f"{scoring}_{level}")])
        assert np.abs(got - expected[level]).max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assay.csv", "scores.csv"]


@pytest.mark.parametrize("levels", [["28K", "207K"], ["207K", "28K"]])
def test_named_levels_are_columns_in_their_order(tmp_path, table, levels):
    output = tmp_path / "scores.tsv"
    assert run(table, "--sequence", WILD, "-o", output, "--level", ",".join(levels)).exit_code == 0
    header = output.read_text().splitlines()[0]
    assert header == f"mutant\tscore\tmasked_{levels[0]}\tmasked_{levels[1]}"
    result = run(table, "--sequence", WILD, "-o", output, "--level", f"{levels[0]},5M")
    assert "expected level to be one of '28K', '90K', '207K', '1M', got '5M'" in result.stderr


def test_rows_without_a_score_stay_and_are_listed(tmp_path):
    path, output = tmp_path / "a.csv", tmp_path / "scores.csv"
    path.write_text(f"mutant,score\n{SINGLE[0]},1\nW999A,2\nK2del,3\nonly\nWT,5\n")
    result = run(path, "--sequence", WILD, "-o", output)
    assert result.exit_code == 3
    assert "Rows without a score: 3." in result.stderr
    assert column(output, "mutant") == [SINGLE[0], "W999A", "K2del", "WT"]
    scores = column(output, "masked_1M")
    assert scores[1:] == ["", "", "0.000000"]
    assert float(scores[0]) != 0
    listed = (tmp_path / "scores.csv.failed.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["identifier", "W999A", "K2del", "line 5"]
    assert [line.split("\t")[4] for line in listed[1:]] == ["3", "4", "5"]
    assert run(path, "--sequence", WILD, "-o", output, "--mutation-column", "mutant").exit_code == 3
    path.write_text(f"mutant\n{SINGLE[0]}\n")
    assert run(path, "--sequence", WILD, "-o", output).exit_code == 0
    assert not (tmp_path / "scores.csv.failed.tsv").exists()


def test_sites_too_far_apart_for_a_window_are_rows_without_a_score(tmp_path, table):
    output = tmp_path / "scores.csv"
    result = run(table, "--sequence", WILD, "-o", output, "--scoring", "masked-jointly", "--window", "4")
    assert result.exit_code == 3
    assert "The model sees 4 of 24 residues, around each site." in result.stderr
    assert "expected sites within a window of 4 residues" in (tmp_path / "scores.csv.failed.tsv").read_text()
    assert [place for place, each in enumerate(column(output, "masked-jointly_1M")) if not each] == list(
        range(len(SINGLE), len(SINGLE) + len(SEVERAL))
    )


def test_a_table_of_which_nothing_fits_is_an_error_with_the_offset_that_would(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("mutant\n" + "".join(f"{each.name}\n" for each in all_single(WILD, 101)))
    result = run(path, "--sequence", WILD, "-o", tmp_path / "scores.csv")
    assert result.exit_code == 1
    assert "got 0 in 456 rows; the first without says: expected a position from 1 to 24" in result.stderr
    assert "number 101, which is --offset 100" in result.stderr
    assert not (tmp_path / "scores.csv").exists()
    assert run(path, "--sequence", WILD, "-o", tmp_path / "scores.csv", "--offset", "100").exit_code == 0


def test_letters_that_fit_by_chance_are_not_scored(tmp_path):
    path, variants = tmp_path / "a.csv", [each.name for each in all_single(WILD, 2)]
    path.write_text("\n".join(["mutant", *variants]))
    fitting = [each for each in variants if WILD[int(each[1:-1]) - 1 :][:1] == each[0]]
    assert fitting
    result = run(path, "--sequence", WILD, "-o", tmp_path / "scores.csv")
    assert result.exit_code == 1
    assert f"got {len(fitting)} in 456 rows" in result.stderr
    assert "--offset 1 without" in result.stderr
    result = run(path, "--sequence", WILD, "--embeddings", tmp_path / "v.h5")
    assert result.exit_code == 1
    assert f"got {len(fitting)} in 456 rows" in result.stderr


def test_zero_based_positions_are_those_of_one_less(tmp_path):
    outputs = []
    for name, first, options in (("one", 1, ()), ("zero", 0, ("--zero-based",)),
                                 ("moved", 24, ("--zero-based", "--offset", 24))):  # fmt: skip
        path, output = tmp_path / f"{name}.csv", tmp_path / f"{name}.tsv"
        path.write_text("mutant\n" + "".join(f"{each.name}\n" for each in all_single(WILD[:3], first)))
        assert run(path, "--sequence", WILD[:3], "-o", output, *options).exit_code == 0
        outputs.append(column(output, "masked_1M"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_wild_type_is_one_record_of_a_file(tmp_path, table):
    fasta, output = tmp_path / "wild.fasta", tmp_path / "scores.csv"
    fasta.write_text(f">a\n{WILD[:-1]}\n>b\n{WILD}\n")
    result = run(table, "--wild-type", fasta, "-o", output)
    assert (
        "expected one sequence in the file of the wild type, or --record with its name, got 2"
        in result.stderr
    )
    assert "called c, got none" in run(table, "--wild-type", fasta, "--record", "c", "-o", output).stderr
    assert run(table, "--wild-type", fasta, "--record", "b", "-o", output).exit_code == 0
    result = run(table, "--sequence", WILD, "--record", "b", "-o", output)
    assert "expected --record together with --wild-type FASTA" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected -o for scores, or --embeddings, got neither"),
        (("--heat-map", "m.png"), "expected -o with a heat map"),
        (("--embeddings", "v.h5", "--heat-map", "m.png"), "expected -o with a heat map"),
        (("-o", "scores.xlsx"), "expected a table that ends in .csv or .tsv, got 'scores.xlsx'"),
        (("-o", "nowhere/scores.csv"), "expected a folder nowhere to write to"),
        (("-o", "scores.csv", "--level", "650M"), "expected level to be one of '28K'"),
        (("-o", "scores.csv", "--level", "28K,28K"), "each level once, or as all, got '28K,28K'"),
        (("-o", "assay.csv"), "expected another output than the table of variants, got assay.csv for both"),
        (("-o", "scores.csv", "--all-single"), "expected TABLE or --all-single, got both"),
        (("-o", "scores.csv", "--wild-type", "x.fasta"), "FASTA or --sequence, got both"),
        (("-o", "scores.csv", "--heat-map", "m.gif"), "expected a picture that ends in .png"),
        (("--embeddings", "v.pt"), "expected pool to be one of"),
        (("--embeddings", "v.h5", "--pool", "middle"), "expected pool to be one or several of 'mean'"),
        (("-o", "scores.csv", "--model", "nowhere"), "expected a checkpoint's folder"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_runs(tmp_path, table, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    extra = ("--pool", "sites") if options == ("--embeddings", "v.pt") else ()
    result = run(table, "--sequence", WILD, *options, *extra)
    assert result.exit_code == 1
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["assay.csv"]


def test_a_column_that_would_be_written_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"mutant,masked_1M\n{SINGLE[0]},1\n")
    result = run(path, "--sequence", WILD, "-o", tmp_path / "scores.csv")
    assert "expected a table without a column 'masked_1M', which is to be written, got one" in result.stderr


def test_a_killed_run_goes_on_with_the_answers_it_has(tmp_path, table, monkeypatch):
    monkeypatch.setattr(asking, "TOKENS_KEPT_TOGETHER", 3 * len(WILD))
    output, answer, ran = tmp_path / "scores.csv", asking.LanguageModel._answer, []

    def dying(self, chunk, *others):
        ran.append(len(chunk))
        if len(ran) == 3:
            raise OSError("the machine went away")
        return answer(self, chunk, *others)

    monkeypatch.setattr(asking.LanguageModel, "_answer", dying)
    arguments = (table, "--sequence", WILD, "-o", output)
    assert "the machine went away" in run(*arguments).stderr
    assert not output.exists()
    assert len(list((tmp_path / "scores.csv.part").glob("*.npz"))) == 2
    assert run(*arguments, "--level", "90K").exit_code == 0  # another question: nothing of it is there
    in_between = len(ran)
    assert in_between == 3 + 8
    output.unlink()
    ran[:] = [0] * 3
    assert run(*arguments).exit_code == 0
    whole = tmp_path / "whole.csv"
    assert run(table, "--sequence", WILD, "-o", whole).exit_code == 0
    assert whole.read_text() == output.read_text()


def test_two_processes_do_not_write_one_table(tmp_path, table):
    output = tmp_path / "scores.csv"
    (tmp_path / "scores.csv.part").mkdir()
    lock = take_lock(tmp_path / "scores.csv.part", output)
    assert "got another process that does" in run(table, "--sequence", WILD, "-o", output).stderr
    lock.release()


def test_long_proteins_are_said(tmp_path):
    result = run("--all-single", "--sequence", WILD * 43, "-o", tmp_path / "s.csv", "--scoring", "wild-type")
    assert "The model sees all 1,032 residues at once. ESM-2 was trained on at most 1,022" in result.stderr
    with (tmp_path / "s.csv").open() as handle:
        assert sum(1 for _ in handle) == 1 + 19 * 43 * len(WILD)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_heat_map_is_drawn(tmp_path, suffix):
    picture = tmp_path / f"map.{suffix}"
    options = ("--heat-map", picture, "--level", "28K,1M", "--offset", "23")
    result = run("--all-single", "--sequence", WILD, "-o", tmp_path / "s.csv", *options)
    assert result.exit_code == 0, result.stderr
    assert picture.stat().st_size > 5_000


def test_the_heat_map_shows_each_score_where_it_belongs(monkeypatch, tmp_path, shipped):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (kept.append(figure), path.touch()))
    wild = random_sequence(100, seed=1)
    variants = [
        f"{wild[9]}10{'W' if wild[9] != 'W' else 'G'}",
        f"{wild[98]}99{'A' if wild[98] != 'A' else 'C'}",
    ]
    scores = {"28K": [-2.0, 1.0], "1M": [-4.0, 3.0]}
    rd_torch.plot_variants(
        wild,
        [*variants, f"{variants[0]}:{variants[1]}"],
        {level: [*each, 9.0] for level, each in scores.items()},
        tmp_path / "m.png",
    )
    images = [ax.images[0].get_array() for ax in kept[0].axes if ax.images]
    assert len(images) == 4  # 90 positions in two rows, for two levels
    for level, pair in enumerate(scores.values()):
        first, last = images[level], images[2 + level]
        assert first.shape == (20, 45)
        assert first[ORDER.index(variants[0][-1]), 0] == pair[0]
        assert last[ORDER.index(variants[1][-1]), -1] == pair[1]
        shown = np.ma.filled(np.ma.masked_invalid(first), np.nan)
        assert [shown[ORDER.index(letter), place] for place, letter in enumerate(wild[9:54])] == [0] * 45
        assert np.isfinite(shown).sum() == 46
    labels = [ax.get_title(loc="left") for ax in kept[0].axes if ax.images]
    assert labels[0] == "28K: positions 10 to 54"


def test_a_heat_map_needs_single_substitutions(tmp_path):
    path, output = tmp_path / "a.csv", tmp_path / "s.csv"
    path.write_text(f"mutant\n{SEVERAL[0]}\n")
    result = run(path, "--sequence", WILD, "-o", output, "--heat-map", tmp_path / "m.png")
    assert "expected single substitutions for a heat map, got none in" in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]
    with pytest.raises(ValueError, match="expected at least one single substitution"):
        rd_torch.plot_variants("MKV", ["M1A:K2R", "WT"], {"1M": [1.0, 0.0]}, tmp_path / "m.png")
    with pytest.raises(ValueError, match="expected 1 scores of level 1M, got 2"):
        rd_torch.plot_variants("MKV", ["M1A"], {"1M": [1.0, 0.0]}, tmp_path / "m.png")


# Embeddings


WAYS = ["mean", "sites", "mean-difference", "sites-difference"]


def expected_embeddings(model, variants, width=None):
    """Of each way, from the rows of each whole sequence alone."""
    (wild,) = rd_torch.embed(model, [WILD], pool="none", width=width)
    found = {way: [] for way in WAYS}
    for variant in variants:
        sites = list(variant.sites)
        (rows,) = rd_torch.embed(model, [variant.mutate(WILD)], pool="none", width=width)
        found["mean"].append(rows.mean(0))
        found["sites"].append(rows[sites].mean(0))
        found["mean-difference"].append(rows.mean(0) - wild.mean(0))
        found["sites-difference"].append(rows[sites].mean(0) - wild[sites].mean(0))
    return {way: np.stack(vectors) for way, vectors in found.items()}


@pytest.mark.parametrize("suffix", ["h5", "parquet"])
@pytest.mark.parametrize("width", [None, 40])
def test_each_way_to_embed_a_variant_is_its_formula(tmp_path, shipped, suffix, width):
    variants = [*SINGLE[:7], *SEVERAL]
    expected = expected_embeddings(shipped, [read_variant(each, WILD) for each in variants], width)
    for way in (*WAYS, "+".join(WAYS)):
        path = tmp_path / f"{way}.{suffix}"
        assert not rd_torch.embed_variants(shipped, WILD, variants, path, pool=way, width=width)
        store = open_store(path)
        assert list(store) == variants
        assert store.pool == way
        joined = np.concatenate([expected[each] for each in way.split("+")], 1)
        assert np.abs(np.asarray(store) - joined).max() < 2e-5


def test_embeddings_of_variants_are_nested(tmp_path, shipped):
    rd_torch.embed_variants(shipped, WILD, SINGLE, tmp_path / "a.h5", pool=WAYS)
    rd_torch.embed_variants(shipped, WILD, SINGLE, tmp_path / "b.h5", pool=WAYS, width=48)
    cut = open_store(tmp_path / "a.h5").read(slice(None), width=48)
    assert np.array_equal(cut, np.asarray(open_store(tmp_path / "b.h5")))


def test_the_wild_type_has_a_mean_and_no_sites(tmp_path, shipped):
    assert not rd_torch.embed_variants(
        shipped, WILD, ["WT", SINGLE[0]], tmp_path / "a.h5", pool="mean-difference"
    )
    difference = open_store(tmp_path / "a.h5")["WT"]
    assert np.abs(difference).max() < 1e-5
    failures = rd_torch.embed_variants(shipped, WILD, ["WT", SINGLE[0]], tmp_path / "b.h5", pool="sites")
    assert list(failures) == ["WT"]
    assert failures["WT"].reason == "expected a variant with mutated sites, got the wild type, which has none"
    assert list(open_store(tmp_path / "b.h5")) == [SINGLE[0]]


def test_equal_variants_and_the_wild_type_are_embedded_once(tmp_path, shipped, monkeypatch):
    rows, encode = [], RDModel.encode
    monkeypatch.setattr(RDModel, "encode", lambda *a, **k: (rows.append(len(a[1])), encode(*a, **k))[1])
    with pytest.warns(UserWarning, match="records whose identifier an earlier record has"):
        rd_torch.embed_variants(shipped, WILD, [*SINGLE, *SINGLE], tmp_path / "a.h5", pool="sites-difference")
    assert sum(rows) == len(SINGLE) + 1


def test_a_store_of_another_wild_type_or_way_is_not_gone_on_with(tmp_path, shipped):
    path = tmp_path / "a.h5"
    rd_torch.embed_variants(shipped, WILD, SINGLE[:2], path, pool="mean")
    rd_torch.embed_variants(shipped, WILD, SINGLE[:2], path, pool="mean")
    with pytest.raises(ValueError, match="expected pool mean"):
        rd_torch.embed_variants(shipped, WILD, SINGLE[:2], path, pool="sites")
    with pytest.raises(ValueError, match="with which .* was made, got others"):
        rd_torch.embed_variants(shipped, WILD, SINGLE[:3], path, pool="mean")


@pytest.mark.parametrize("pool", ["max", "none", "", "mean+mean", ["sites", "sites"]])
def test_other_ways_to_pool_are_refused(tmp_path, shipped, pool):
    with pytest.raises(ValueError, match="expected pool to be one or several of 'mean', 'sites'"):
        rd_torch.embed_variants(shipped, WILD, SINGLE, tmp_path / "a.h5", pool=pool)


def test_differences_are_not_taken_for_means(tmp_path, shipped):
    path, nesting = tmp_path / "28K.h5", rd_torch.Nesting(shipped.config, shipped.stages)
    alone = RDModel({"28K": shipped.backbones["28K"]}, [])
    rd_torch.embed_variants(alone, WILD, SINGLE[:2], path, pool="mean-difference")
    with pytest.raises(ValueError, match="expected means, or a vector for each residue"):
        rd_torch.combine_stores(nesting, {"28K": path}, tmp_path / "out.h5")


def test_the_command_embeds_and_lists_what_it_cannot(tmp_path, shipped):
    path = tmp_path / "a.csv"
    path.write_text(f"mutant\n{SINGLE[0]}\nK2del\n{SINGLE[1]}\n")
    store = tmp_path / "v.parquet"
    result = run(
        path, "--sequence", WILD, "--embeddings", store, "--pool", "mean,sites-difference", "--width", 48
    )
    assert result.exit_code == 3
    assert "Left out 1 of the variants." in result.stderr
    rd_torch.embed_variants(
        shipped, WILD, SINGLE[:2], tmp_path / "p.parquet", pool=["mean", "sites-difference"], width=48
    )
    assert list(open_store(store)) == SINGLE[:2]
    assert np.abs(np.asarray(open_store(store)) - np.asarray(open_store(tmp_path / "p.parquet"))).max() < 1e-6
    assert "K2del" in (tmp_path / "v.parquet.failed.tsv").read_text()


def test_another_wild_type_is_refused_though_its_variants_have_the_same_sequences(shipped, tmp_path):
    other = f"A{WILD[1:]}"
    variants = [Variant("v", (Substitution(0, sequence[0], "K"),)) for sequence in (WILD, other)]
    assert variants[0].mutate(WILD) == variants[1].mutate(other)
    for pool in ("mean-difference", "mean"):
        path = tmp_path / f"{pool}.h5"
        rd_torch.embed_variants(shipped, WILD, variants[:1], path, pool=pool)
        with pytest.raises(ValueError, match="was made, got others"):
            rd_torch.embed_variants(shipped, other, variants[1:], path, pool=pool)
