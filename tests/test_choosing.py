"""Moments of alternatives, choices of layers by criteria and by labels, and what a fit records of them."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import random_sequence
from scipy.stats import special_ortho_group
from test_moments import dyadic_rows

import rd_torch
from rd_torch import Labelled, RDModel, RunningMoments, choose_layers
from rd_torch.candidates import Candidates
from rd_torch.choosing import candidates_of
from rd_torch.cli import main
from rd_torch.labelled import cross_validated, read_labelled, require_labelled
from rd_torch.moments import count_products

SEQUENCES = [random_sequence(20 + 3 * (k % 11), seed=k) for k in range(60)]


@pytest.fixture(scope="module")
def mini():
    return RDModel.from_pretrained("esm2-rd-mini")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_moments_of_alternatives_are_those_of_all_products():
    rows = dyadic_rows(200, 12)
    whole, parts = RunningMoments(12), RunningMoments(12, alternatives=[[2, 3], [4], [1, 2]])
    for batch in rows.split(37):
        whole.update(batch)
        parts.update(batch)
    columns = torch.tensor([2, 3, 4, 5, 6, 7, 8, 10, 11])  # the second, the only and the second alternative
    expected = whole.covariance()[columns[:, None], columns]
    torch.testing.assert_close(parts.covariance(columns), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.mean, whole.mean)
    with pytest.raises(ValueError, match="one alternative of each group"):
        parts.covariance(torch.tensor([0, 2]))
    assert len(parts.parts[2]) == count_products([[2, 3], [4], [1, 2]]) < 144


def test_moments_of_alternatives_merge_and_are_made_of_their_parts():
    groups = [[3, 3], [2]]
    rows, whole = dyadic_rows(90, 8), RunningMoments(8, alternatives=groups)
    whole.update(rows)
    first, second = (RunningMoments(8, alternatives=groups) for _ in range(2))
    first.update(rows[:40])
    second.update(rows[40:])
    first.merge(RunningMoments.of(*second.parts, alternatives=groups))
    columns = torch.tensor([3, 4, 5, 6, 7])
    torch.testing.assert_close(first.covariance(columns), whole.covariance(columns), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="other alternatives"):
        first.merge(RunningMoments(8))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [["a"], ["b"]]),
        ("all", [["a@1", "a"], ["b@1", "b@2", "b@3", "b"]]),
        ({"b": 3}, [["a"], ["b@3"]]),
        ({"b": 4}, [["a"], ["b"]]),
        ({"a": "all", "b": [3, 1]}, [["a@1", "a"], ["b@1", "b@3"]]),
        ([2, 3], [["a"], ["b@2", "b@3"]]),  # each backbone takes those that it has
    ],
)
def test_candidates_are_named_by_backbone_and_layer(layers, expected):
    assert candidates_of({"a": 2, "b": 4}, layers) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"c": 1}, "a backbone in layers to be one of 'a', 'b'"),
        ({"b": 5}, "layers from 1 to 4, which b has, got"),
        ({"b": [1, 0]}, "layers from 1 to 4"),
        ([3], "layers from 1 to 2, which a has"),
        ("last", "layers to be one of 'all'"),
    ],
)
def test_candidates_that_cannot_be_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        candidates_of({"a": 2, "b": 4}, layers)


def planted(seed=0):
    """Two backbones: of b, layer 1 follows from a, layer 2 is new, and the last, 3, is flat."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4_000, 6, dtype=torch.float64, generator=generator)
    new = torch.randn(4_000, 8, dtype=torch.float64, generator=generator)
    one = a @ torch.randn(6, 8, dtype=torch.float64, generator=generator) + 0.1 * new
    three = new.clone()
    three[:, 1:] *= 0.01
    widths = {"a": 6, "b@1": 8, "b@2": 8, "b": 8}
    moments = RunningMoments(30)
    moments.update(torch.cat([a, one, new, three], 1))
    return moments, widths


def test_criteria_find_what_they_are_to_find():
    moments, widths = planted()
    assert choose_layers(moments, widths, criterion="added") == [
        "a",
        "b",
    ]  # two directions hold nearly all of it
    assert choose_layers(moments, widths, criterion="added", added=8) == ["a", "b@2"]
    assert choose_layers(moments, widths, criterion="rank") == ["a", "b@2"]
    with pytest.raises(ValueError, match="criterion to be one of"):
        choose_layers(moments, widths, criterion="labels")


def test_a_rotation_changes_no_choice():
    moments, widths = planted()
    turn = torch.block_diag(
        *(torch.from_numpy(special_ortho_group.rvs(w, random_state=w)) for w in widths.values())
    )
    count, mean, scatter = moments.parts
    turned = RunningMoments.of(count, mean @ turn, turn.T @ scatter @ turn)
    for criterion in ("rank", "added"):
        chosen = choose_layers(moments, widths, criterion=criterion)
        assert choose_layers(turned, widths, criterion=criterion) == chosen


def test_one_pass_gives_what_a_fit_of_these_layers_gives(mini):
    chosen = rd_torch.fit(mini.backbones, SEQUENCES, layers="all", choose_layers="added")
    assert list(chosen.config.widths) != list(mini.config.widths)
    parts = {name: mini.backbones[name.partition("@")[0]] for name in chosen.config.widths}
    alone = rd_torch.fit(parts, SEQUENCES)
    for ours, other in zip(
        chosen.stages.state_dict().values(), alone.stages.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    record = chosen.config.provenance["fit"]["layers"]
    assert record["chosen by"] == "added"
    assert len(record["scores"]) == 2 + 3 + 4 + 6
    assert "layers" not in alone.config.provenance["fit"]


def test_a_fit_of_candidates_goes_on_where_it_was(mini, tmp_path):
    from test_fitting import KilledError, killed_after

    options = {"layers": {"1M": [2, 3]}, "work_folder": tmp_path / "work", "tokens_per_batch": 64}
    whole = rd_torch.fit(mini.backbones, SEQUENCES, layers={"1M": [2, 3]}, tokens_per_batch=64)
    with pytest.raises(KilledError):
        rd_torch.fit(mini.backbones, SEQUENCES, **options, progress=killed_after(600))
    again = rd_torch.fit(mini.backbones, SEQUENCES, **options, choose_layers="added")
    same = rd_torch.fit(mini.backbones, SEQUENCES, **options)
    assert same.fingerprint() == whole.fingerprint()
    assert again.config.provenance["fit"]["layers"]["chosen by"] == "added"
    with pytest.raises(ValueError, match="levels"):
        rd_torch.fit(mini.backbones, SEQUENCES, **{**options, "layers": "all"})
    with pytest.raises(ValueError, match="fingerprint"):
        rd_torch.fit(mini.backbones, SEQUENCES, **options, final_norm=False)


def test_memory_is_said_before_anything_runs(mini, monkeypatch):
    from rd_torch import candidates

    monkeypatch.setattr(candidates.hardware, "free_bytes", lambda device: 1_000)
    with pytest.raises(MemoryError, match="moments of 15 candidate layers, .* GiB free: name fewer layers"):
        rd_torch.fit(mini.backbones, iter(SEQUENCES), layers="all")


def labelled_by(mini, level, seed=0):
    """Sequences whose labels are a direction of one layer's mean embedding, and noise."""
    alone = RDModel({level: mini.backbones[level.partition("@")[0]]}, []).eval()
    vectors = rd_torch.embed(alone, SEQUENCES)
    rng = np.random.default_rng(seed)
    return (vectors - vectors.mean(0)) / vectors.std(0) @ rng.normal(size=vectors.shape[1])


def test_labels_find_the_layer_in_which_they_are_planted(mini):
    scores = labelled_by(mini, "28K@1")
    model = rd_torch.fit(
        mini.backbones,
        SEQUENCES,
        layers={"28K": "all"},
        choose_layers="labels",
        labelled=Labelled(SEQUENCES, scores, "planted"),
    )
    assert next(iter(model.config.widths)) == "28K@1"
    record = model.config.provenance["fit"]["layers"]
    assert record["labels"] == "planted"
    assert record["scores"]["28K@1"] > record["scores"]["28K"]


def test_means_are_those_of_embed_in_the_order_of_the_input(mini):
    candidates = Candidates.of(mini.backbones, layers="all")
    order = np.random.default_rng(0).permutation(len(SEQUENCES))
    means = candidates.means([SEQUENCES[k] for k in order], 200)
    alone = RDModel({"1M@3": mini.backbones["1M"]}, []).eval()
    np.testing.assert_allclose(means["1M@3"], rd_torch.embed(alone, SEQUENCES)[order], atol=1e-5)


def test_shuffled_labels_are_worth_nothing():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 10))
    assert cross_validated(features, features @ rng.normal(size=10)) > 0.95
    assert cross_validated(features, rng.normal(size=200)) < 0.1
    classes = np.where(features[:, 0] > 0, "in", "out")
    assert cross_validated(features, classes) > 0.9
    assert abs(cross_validated(features, rng.permutation(classes)) - 0.5) < 0.15


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0] * 60, "labels that differ"),
        ([float("nan")] + [1.0] * 59, "finite labels"),
        ([1.0, 2.0], "a label for each of 10 sequences or more, got 2 labels"),
        (["x"] * 58 + ["y"] * 2, "two classes or more, each of 5 sequences or more, got 58 of x, 2 of y"),
        (["x"] * 60, "two classes or more"),
    ],
)
def test_labels_that_choose_nothing_are_refused(mini, labels, message):
    with pytest.raises(ValueError, match=message):
        rd_torch.fit(
            mini.backbones,
            iter(SEQUENCES),
            layers="all",
            choose_layers="labels",
            labelled=Labelled(SEQUENCES, labels),
        )


def test_labels_are_needed_where_they_are_to_choose(mini, monkeypatch):
    with pytest.raises(ValueError, match="got none: give `labelled`"):
        rd_torch.fit(mini.backbones, SEQUENCES, layers="all", choose_layers="labels")
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install rd_torch\[learn\]"):
        require_labelled(Labelled(SEQUENCES, list(range(60))))


def test_tables_are_read_with_numbers_or_classes(tmp_path):
    table = tmp_path / "assay.tsv"
    table.write_text(
        "name\tsequence\tTm\tplace\n" + "".join(f"p{k}\t{s}\t{k / 2}\tin\n" for k, s in enumerate(SEQUENCES))
    )
    assert read_labelled(table, "Tm", "sequence").labels[:3] == [0.0, 0.5, 1.0]
    assert read_labelled(table, "place", "sequence").labels[0] == "in"
    with pytest.warns(UserWarning, match="sequences from column 'sequence'"):
        assert read_labelled(table, "Tm").sequences == SEQUENCES
    with pytest.raises(ValueError, match="expected a column 'pH'"):
        read_labelled(table, "pH")


def test_the_command_chooses_layers(mini, tmp_path):
    fasta, table = tmp_path / "proteins.fasta", tmp_path / "table.csv"
    fasta.write_text("".join(f">p{k}\n{sequence}\n" for k, sequence in enumerate(SEQUENCES)))
    scores = labelled_by(mini, "28K@1")
    table.write_text(
        "sequence,score\n" + "".join(f"{s},{y}\n" for s, y in zip(SEQUENCES, scores, strict=True))
    )
    done = run("fit", fasta, "-o", tmp_path / "a", "--choose-layers", "added")
    assert done.exit_code == 0, done.output
    assert "Moments of 15 candidate layers take 0.0" in done.stderr
    assert "Layers were chosen by added." in done.stderr
    expected = rd_torch.fit(mini.backbones, SEQUENCES, layers="all", choose_layers="added")
    assert RDModel.from_pretrained(tmp_path / "a").fingerprint() == expected.fingerprint()
    labels = ("--choose-layers", "labels", "--table", table, "--target", "score", "--layers", "28K@1,28K@2")
    done = run("fit", fasta, "-o", tmp_path / "b", *labels)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["levels"][0]["name"] == "28K@1"
    assert config["provenance"]["fit"]["layers"]["labels"] == "score of table.csv"
    done = run("fit", fasta, "-o", tmp_path / "c", "--layers", "2", "--no-final-norm", "--added", "8,8,8")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert [level["name"] for level in config["levels"]] == ["28K", "90K@2", "207K@2", "1M@2"]
    assert config["final_norm"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--choose-layers", "labels"), "expected --table and --target with --choose-layers labels"),
        (("--table", "t.csv", "--target", "y"), "expected --table and --target with --choose-layers labels"),
        (("--layers", "28K"), "expected --layers as all, 24,25 or 650M@24,650M@25, got '28K'"),
        (("--layers", "28K@3"), "layers from 1 to 2, which 28K has"),
        (("--layers", "3M@1"), "a backbone in layers to be one of"),
        (("--choose-layers", "best"), "Invalid value"),
    ],
)
def test_wrong_options_get_one_clear_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta").write_text(">p\nMKTAYIAKQR\n")
    (tmp_path / "t.csv").write_text("sequence,y\nMKTAYIAKQR,1\n")
    done = run("fit", "p.fasta", "-o", "out", *arguments)
    assert done.exit_code != 0
    assert message in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
