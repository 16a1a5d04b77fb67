"""`benchmarks/scaling/` in small: finds what was planted, nothing in noise, sees no test half, resumes."""

import csv
import gzip
import json
import lzma
import re
import sys
from itertools import chain, islice, product

import numpy as np
import pytest
import torch

import rd_torch
from benchmarks.scaling import added, probes, scaling
from benchmarks.scaling.angles import angles_at_random, angles_between, principal_angles
from benchmarks.scaling.approaches import (
    ALL_LAST,
    BY_CRITERION,
    CONCAT_LAST,
    NESTED_LAST,
    OF_MIDDLE,
    PCA_LAST,
    PLAIN_LAST,
    PLAIN_ROTATED,
    RIVALS,
    SCALED,
)
from benchmarks.scaling.cache import Cache, Kept
from benchmarks.scaling.data import (
    MUTATIONS,
    TASKS,
    DataSet,
    halves,
    melting_set,
    mutate,
    mutation_sets,
    proteingym_assays,
    read_sets,
    structure_set,
)
from benchmarks.scaling.probes import Rows
from benchmarks.scaling.records import Place, Record, interval, means_of
from benchmarks.scaling.study import cut_at, disjoint_samples
from benchmarks.scaling.tables import angle_row
from benchmarks.scaling.wins import EQUAL, LEAST_SETS, WIDER, all_win_rows, win_rows, wins
from rd_torch import Fasta, RDModel

LEVELS = ["a", "b", "c"]
WIDTHS = {"a": 6, "b": 10, "c": 14}
TOTAL = sum(WIDTHS.values())


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(rows, seed):
    """Raw embeddings of three levels side by side: shared latents of falling strength, and noise."""
    mixing = np.random.default_rng(99).normal(size=(8, TOTAL)) * 2 / np.arange(1, 9)[:, None]
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 8)) @ mixing + rng.normal(size=(rows, TOTAL))


def test_wins_are_counted_with_ties_as_halves_and_intervals_keep_pairs_together():
    assert wins(np.array([[0.1, -0.1, 0.0]])).tolist() == [[1.0, 0.0, 0.5]]
    assert interval(np.ones((5, 2))) == (1.0, 1.0)
    paired = np.array([[1.0, 0.0]] * 7)
    assert interval(paired) == (0.5, 0.5)  # every data set has one of each, whichever are drawn
    low, high = interval(np.random.default_rng(0).normal(size=(400, 1)))
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def record_of(place=("plain", "a"), data="one", task="some", head="linear", scores=(0.5,), split=0):
    """A score, with its first metric and others."""
    named = dict(zip(("Spearman", "macro AUPR"), scores, strict=False))
    return Record("", *place, 6, 100, ("a@1",), data, task, head, split, named)


def test_a_data_sets_score_is_the_mean_over_its_splits_in_the_tasks_first_metric():
    records = [record_of(scores=(share, 0.9), split=split) for split, share in enumerate((0.2, 0.3, 0.7))]
    assert means_of(records) == {"one": {("plain", "a"): pytest.approx(0.4)}}


def test_the_first_of_a_comparison_is_the_one_that_wins():
    order = [PLAIN_LAST, PLAIN_ROTATED, "PCA of the largest, last layer", NESTED_LAST, "plain, best layer"]
    order += ["all directions, last layers", "nested, chosen layers", "concat + PCA, last layers"]

    def score(place):  # later approaches and wider levels are better
        return order.index(place.approach) + LEVELS.index(place.level) / 10

    means = {"one": {place: score(place) for place in (Place(*each) for each in product(order, LEVELS))}}
    rows = win_rows(means, LEVELS, head="some")
    assert len(rows) == len(WIDER) + len(EQUAL)
    for row in rows:
        assert row["all levels"] == "1.00 [1.00, 1.00]"
        assert row["mean difference"].startswith("+")
        assert (row["head"], row["b"], row["c"]) == ("some", "1.00", "1.00")
    del means["one"][Place(NESTED_LAST, "b")]  # a head need not judge every approach
    assert len(win_rows(means, LEVELS)) == len(rows) - 1 - sum(NESTED_LAST in pair for pair in EQUAL)


def chosen_penalties(judge):
    """Penalties where the half that judges has labels of the other half's kind, and where it has noise."""

    rows, rng = torch.from_numpy(draw(120, 5)), np.random.default_rng(1)
    labels = rows[:, 0] + 0.1 * torch.from_numpy(rng.normal(size=120))
    noise = 100 * torch.from_numpy(rng.normal(size=60))
    taught = Rows(rows[:60], labels[:60])
    return [judge("linear", taught, Rows(rows[60:], each), 0, 0)["alpha"] for each in (labels[60:], noise)]


def test_the_penalty_does_not_see_the_half_that_judges():
    one, other = chosen_penalties(probes.judge)
    assert one == other


def test_a_penalty_that_sees_the_half_that_judges_is_caught():
    def leaking(head, taught, judged, classes, seed):
        everything = probes.Rows(*map(torch.cat, zip(taught, judged, strict=True)))
        return probes.judge(head, everything, judged, classes, seed)

    one, other = chosen_penalties(leaking)
    assert one != other


@pytest.mark.parametrize("rows", [20, 29, 30, 31, 200])
def test_the_penalty_is_the_one_of_least_generalised_cross_validation_error(rows):
    X, rng = draw(rows, 3), np.random.default_rng(0)
    y = X[:, 0] + 2 * rng.normal(size=rows) + 7
    ridge = probes.fit_ridge(torch.from_numpy(X), torch.from_numpy(y))
    centred, errors = X - X.mean(0), {}
    for alpha in probes.PENALTIES:
        hat = centred @ np.linalg.inv(centred.T @ centred + alpha * np.eye(TOTAL)) @ centred.T + 1 / rows
        errors[alpha] = ((y - hat @ y) ** 2).sum() / (rows - np.trace(hat)) ** 2
        if alpha == ridge.alpha:
            np.testing.assert_allclose(ridge(torch.from_numpy(X)).numpy(), hat @ y, atol=1e-6)
    assert errors[ridge.alpha] == pytest.approx(min(errors.values()))
    if rows == 200:
        assert 1e-3 < ridge.alpha < 1e7  # with as many rows as features the error may fall to either end


@pytest.mark.parametrize("shape", [(50, 30), (20, 30)])
def test_without_a_penalty_ridge_is_the_least_squares_solution_of_minimum_norm(shape):
    X = np.random.default_rng(0).normal(size=shape)
    X[:, 1] = X[:, 0]
    y = np.random.default_rng(1).normal(size=shape[0])
    ridge = probes.fit_ridge(torch.from_numpy(X), torch.from_numpy(y), penalties=(0.0,))
    expected = np.linalg.lstsq(X - X.mean(0), y - y.mean(), rcond=1e-9)[0]
    np.testing.assert_allclose(ridge.weights.numpy(), expected, atol=1e-9)


def test_features_are_standardised_by_the_rows_that_teach_and_constant_ones_vanish():
    known = torch.tensor([[1.0, 0.1, 5.0], [3.0, 0.1, 7.0]], dtype=torch.float64)
    unknown = torch.tensor([[5.0, 9.0, 6.0]], dtype=torch.float64)
    taught, judged = probes.standardise(known, unknown)
    root = 0.5**0.5
    torch.testing.assert_close(taught, torch.tensor([[-root, 0, -root], [root, 0, root]]).double())
    torch.testing.assert_close(judged, torch.tensor([[3 * root, 0, 0]]).double())


def test_the_mlp_finds_what_no_line_does_and_leaves_the_random_numbers_alone():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(1_200, 4)))

    def scores(head, labels, classes):
        rows = (probes.Rows(features[part], labels[part]) for part in (slice(800), slice(800, None)))
        return probes.judge(head, *rows, classes, 0)

    numbers = features[:, 0] * features[:, 1]
    state = torch.get_rng_state()
    found = scores("MLP", numbers, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == scores("MLP", numbers, 0)
    assert found["Spearman"] > 0.8
    assert abs(scores("linear", numbers, 0)["Spearman"]) < 0.2
    classes = (numbers > -0.3).long() + (numbers > 0.3).long()
    assert scores("MLP", classes, 3)["accuracy"] > 0.75
    assert scores("linear", classes, 3)["accuracy"] < 0.5


def test_the_mlp_stops_when_rows_that_it_was_not_taught_get_worse():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 4)))
    labels = torch.cat((features[:400, 0], -features[400:, 0]))
    _, found = probes.small_mlp(features, labels, features, 0, 0)
    assert found["epochs"] <= 2


def test_principal_angles_are_those_between_the_planes():
    turn = torch.tensor(30.0, dtype=torch.float64).deg2rad()
    one = torch.eye(4, dtype=torch.float64)[:, :2]
    other = torch.stack((one[:, 0], turn.cos() * one[:, 1] + turn.sin() * torch.eye(4).double()[:, 2]), dim=1)
    torch.testing.assert_close(
        principal_angles(one, other), torch.tensor([0.0, 30.0]).double(), atol=1e-5, rtol=0
    )
    turned = other @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    torch.testing.assert_close(principal_angles(one, turned), principal_angles(one, other), atol=1e-5, rtol=0)
    assert angles_between([one] * 3).shape == (3, 2)
    assert 20 < angles_at_random(2, 4).mean() < 70
    row = angle_row([one, other, other])  # pairs 30, 30 and 0 degrees apart in the second direction
    assert (row["angle, mean"], row["angle, largest"]) == ("10.0", "20.0")


def test_scores_are_kept_line_by_line_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "scores.jsonl"
    scores = Kept(path)
    scores.add({"split": 0, "head": "linear"}, {"Spearman": 0.5})
    scores.add({"split": 1, "head": "linear"}, {"Spearman": 0.25})
    path.write_text(path.read_text()[:-9])
    again = Kept(path)
    assert again[{"head": "linear", "split": 0}] == {"Spearman": 0.5}
    assert {"split": 1, "head": "linear"} not in again
    again.add({"split": 1, "head": "linear"}, {"Spearman": 0.75})
    assert Kept(path)[{"split": 1, "head": "linear"}] == {"Spearman": 0.75}


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def head_of(path, count):
    with gzip.open(path, "rt") as handle:
        return list(islice(csv.DictReader(handle), count))


@pytest.fixture
def small(tmp_path, data):
    """A folder of the data's beginnings: one assay of 1 and 2 mutations, short proteins."""
    folder = tmp_path / "data"
    name = "DLG4_PDZ3_Faure2022_binding"
    kept = {"1": 0, "2": 0}
    rows = []
    for row in head_of(data / "dms" / f"{name}.csv.gz", 9_000):
        kept[row["num_mutations"]] += 1
        rows += [list(row.values())] * (kept[row["num_mutations"]] <= 100)
    write_csv(folder / "dms" / f"{name}.csv.gz", ["mutant", "num_mutations", "DMS_score"], rows)
    wild = [each for each in Fasta(data / "dms" / "wild_types.fasta") if each.identifier == name]
    (folder / "dms" / "wild_types.fasta").write_text(
        "".join(f">{e.identifier}\n{e.sequence}\n" for e in wild)
    )
    for part, count in (("train", 10), ("valid", 1), ("test", 4)):
        rows = head_of(data / "residue" / f"ss3_{part}.csv.gz", count)
        cut = [[row["id"], row["sequence"][:60], f"-{row['label'][1:60]}"] for row in rows]
        write_csv(folder / "residue" / f"ss3_{part}.csv.gz", ["id", "sequence", "label"], cut)
    rows = head_of(data / "sequence" / "meltome.csv.gz", 5_000)
    chosen = [*[r for r in rows if r["set"] == "train"][:60], *[r for r in rows if r["set"] == "test"][:20]]
    cut = [[r["sequence"][:50], r["tm_mean"], r["n_measurements"], r["set"]] for r in chosen]
    write_csv(folder / "sequence" / "meltome.csv.gz", ["sequence", "tm_mean", "n_measurements", "set"], cut)
    proteins = islice(Fasta(data / "natural50_train.fasta.xz"), 60)
    with lzma.open(folder / "natural50_train.fasta.xz", "wt") as handle:
        handle.write("".join(f">{e.identifier}\n{e.sequence[:50]}\n" for e in proteins))
    return folder


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Runs the script on the small folder; its tables and every score."""

    monkeypatch.setattr(probes, "EPOCHS", 1)
    monkeypatch.setattr("benchmarks.scaling.data.SPLITS", 2)

    def go(cache):
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        folders = {"--data": small, "--cache": tmp_path / cache, "--output": output}
        places = [str(word) for pair in folders.items() for word in pair]
        monkeypatch.setattr(sys, "argv", [scaling.__file__, "--level", "90K", "--sizes", "4", "10", *places])
        scaling.main()
        tables = {
            kind: json.loads((output / f"scaling_{kind}.json").read_text())["rows"]
            for kind in ("scores", "rivals", "wins", "layers", "criteria", "norms", "scales", "stability")
        }
        lines = (output / "scaling_every_score.jsonl").read_text().splitlines()
        return tables, [json.loads(line) for line in lines], output

    return go


def scores_of(every, metric="Spearman", **asked):
    """Scores by data set, a list each, split after split; with no metric the first ones."""
    found = {}
    for row in every:
        if (metric is None or metric in row["scores"]) and asked.items() <= row.items():
            score = next(iter(row["scores"].values())) if metric is None else row["scores"][metric]
            found.setdefault(row["data"], []).append(score)
    return found


def mean_of(every, **asked):
    """The mean over data sets of the means over splits."""
    found = scores_of(every, None, **asked)
    return np.mean([np.mean(each) for each in found.values()])


def check_tables(tables, every):
    """Every mean, difference and deviation that the tables say, once more from the scores."""

    everything = next(row["fit"] for row in every if row["fit"].startswith("all"))
    normed = [row for row in every if (row["fit"], row["middle layers"]) == (everything, "normed")]
    stream = [row for row in every if row["middle layers"] == "stream"]
    for row in tables["scores"]:
        asked = {name: row[name] for name in ("head", "task", "approach")}
        found = scores_of(normed, row["metric"], level="90K", **asked)
        assert row["90K"] == f"{np.mean(list(chain(*found.values()))):.4f}"
        assert row["data sets"] == len(found)
    for row in (*tables["rivals"], *tables["scales"]):
        asked = {name: row[name] for name in ("head", "level")}
        own = mean_of(normed, approach=row["approach"], **asked)
        assert row["score, mean"] == f"{own:.4f}"
        for name in (name for name in row if name.startswith("over ")):
            rival, _, end = name.removeprefix("over ").partition(", at ")
            other = mean_of(normed, approach=rival, **(asked | ({"level": end} if end else {})))
            assert float(row[name].split(" ")[0]) == pytest.approx(own - other, abs=6e-5)
    for row in tables["norms"]:
        asked = {name: row[name] for name in ("head", "level", "approach")}
        assert row["with the norm"] == f"{mean_of(normed, **asked):.4f}"
        assert row["without"] == f"{mean_of(stream, **asked):.4f}"
    for row in tables["layers"]:
        assert row["score, mean"] == f"{mean_of(normed, approach='each layer', level=row['layer']):.4f}"
    for row in tables["criteria"]:
        found = normed if row["norm on middle layers"] == "yes" else stream
        own = mean_of(found, approach=row["choice"], level="90K", head="linear")
        assert row["score at 90K"] == f"{own:.4f}"
        gain = float(row["over last layers at 90K"].split(" ")[0])
        last = mean_of(found, approach=NESTED_LAST, level="90K", head="linear")
        assert gain == pytest.approx(own - last, abs=6e-5)
    for row in tables["stability"]:
        by_sample = []
        for number in range(1, 6):
            fit = f"sample {number}, {row['sequences']} sequences"
            found = scores_of(every, None, fit=fit, level=row["level"])
            by_sample.append([np.mean(found[data]) for data in sorted(found)])
        deviations = np.std(by_sample, axis=0, ddof=1)
        assert row["score, mean"] == f"{np.mean(by_sample):.4f}"
        assert row["deviation, mean"] == f"{deviations.mean():.4f}"
        assert row["deviation, largest"] == f"{deviations.max():.4f}"


def check_compute(every):
    """Compute is counted in the parameters of the layers that ran, of every backbone that is taken."""

    own, last = {"28K": 12_704, "90K": 28_272}, {"28K": 2, "90K": 3}  # parameters of a layer, and layers
    for row in every:
        layers = dict(layer.split("@") for layer in row["layers"])
        assert row["cost"] == sum(own[level] * int(layer) for level, layer in layers.items())
        expected = {
            PLAIN_LAST: [row["level"]],
            PCA_LAST: ["90K"],
            **dict.fromkeys(
                (NESTED_LAST, ALL_LAST, CONCAT_LAST), ["28K", "90K"][: 1 + (row["level"] == "90K")]
            ),
        }.get(row["approach"])
        if expected:
            assert row["cost"] == sum(own[level] * last[level] for level in expected)
        if row["approach"] == PCA_LAST:
            assert row["width"] == {"28K": 32, "90K": 48}[row["level"]]


def test_the_command_measures_everything_resumes_and_computes_nothing_twice(run, monkeypatch):
    whole, every, output = run("whole")
    splits, levels, layers = 2 * 2 + 2 + 1, 2, 2 + 3
    rivals = sum(len(approach.heads) for approach in RIVALS)
    assert (
        len(every)
        == levels
        * (
            splits * (rivals + len(BY_CRITERION))  # with the norm
            + (splits - 2) * len(SCALED)  # not of residues
            + splits * (1 + len(OF_MIDDLE) + len(BY_CRITERION))  # without the norm
            + splits * 2 * 5  # two sizes of five samples
        )
        + 2 * splits * layers
    )
    assert {(row["head"], row["task"], row["metric"]) for row in whole["scores"]} == {
        (head, task, metric)
        for head in ("linear", "MLP")
        for task, metric in (
            ("1 mutation", "Spearman"),
            ("2 mutations", "Spearman"),
            ("secondary structure", "accuracy"),
            ("secondary structure", "macro AUPR"),
            ("melting temperature", "Spearman"),
        )
    }
    assert len(whole["scores"]) == rivals * 5
    assert len(whole["rivals"]) == rivals * levels
    assert [row["layer"] for row in whole["layers"]] == ["28K@1", "28K@2", "90K@1", "90K@2", "90K@3"]
    assert len(whole["criteria"]) == 2 * (1 + len(BY_CRITERION))
    assert [(row["sequences"], row["level"]) for row in whole["stability"]] == [
        (4, "90K"),
        (10, "90K"),
    ]
    check_tables(whole, every)
    check_compute(every)
    for name in ("scores", "compute", "variance"):
        assert (output / f"scaling_{name}.png").stat().st_size > 20_000

    add, calls = Kept.add, []

    def cut_off(self, *arguments):
        add(self, *arguments)
        calls.append(arguments)
        if len(calls) % 150 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "add", cut_off)
    cuts = 0
    while True:
        try:
            assert run("cut")[:2] == (whole, every)
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts == len(calls) // 150 >= 2
    assert (
        len({json.dumps(key, sort_keys=True) for key, _ in calls}) < len(calls) <= len(every)
    )  # of two norms

    def never(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("benchmarks.scaling.study.judge", never)
    monkeypatch.setattr("benchmarks.scaling.study.expected_error", never)
    monkeypatch.setattr("rd_torch.candidates.Candidates.embed", never)
    assert run("cut")[:2] == (whole, every)


def test_numbers_of_added_directions_are_judged_as_the_study_judges(run, small, tmp_path, monkeypatch):
    _, every, _ = run("cache")
    options = {"--data": small, "--cache": tmp_path / "cache", "--output": tmp_path / "added.json"}
    options["--model"] = tmp_path / "chain"
    RDModel.from_pretrained("esm2-rd-mini", level="90K").save_pretrained(options["--model"])
    monkeypatch.setattr(added, "SIZES", (4, 10))
    monkeypatch.setattr(
        sys, "argv", [added.__file__, *(str(each) for pair in options.items() for each in pair)]
    )
    added.main()
    rows = json.loads((tmp_path / "added.json").read_text())["rows"]
    counts = {"90K": "plain 6 12 16 24 36 48"}
    for level, head in product(counts, ("linear", "MLP")):
        chosen = [row for row in rows if (row["level"], row["head"]) == (level, head)]
        numbers = [re.sub(r"\D", "", row["embedding"]) or "plain" for row in chosen]
        assert " ".join(numbers) == counts[level]
        usual = next(row for row in chosen if "default" in row["embedding"])
        for row, approach in ((chosen[0], PLAIN_LAST), (usual, NESTED_LAST)):
            normed = [
                each for each in every if each["middle layers"] == "normed" and each["fit"][:3] == "all"
            ]
            mean = mean_of(normed, level=level, head=head, approach=approach)
            assert float(row["score, mean"]) == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize("final_norm", [True, False])
def test_raw_embeddings_of_all_layers_stand_side_by_side(tmp_path, final_norm):
    model = RDModel.from_pretrained("esm2-rd-mini", level="90K")
    sequences = ["MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKLMNPQRSTVWY", "MX"]
    cache = Cache(tmp_path, model, 8, final_norm)
    assert cache.widths == {"28K@1": 32, "28K@2": 32, "90K@1": 48, "90K@2": 48, "90K@3": 48}
    for pool in ("mean", "none"):
        data = DataSet("some", "some", sequences, np.zeros(3), [], pool=pool)
        alone = [
            rd_torch.embed(
                RDModel({layer: model.family()[layer[:3]]}, [], final_norm=final_norm).eval(),
                sequences,
                pool=pool,
            )
            for layer in cache.widths
        ]
        if pool == "none":
            alone = [np.concatenate(rows) for rows in alone]
        expected = torch.from_numpy(np.hstack(alone))
        for _ in range(2):  # computed, then kept
            torch.testing.assert_close(cache.rows(data), expected, rtol=1e-6, atol=2e-6)
    moments = cache.moments(sequences, "some")
    assert moments.count == 44
    np.testing.assert_allclose(moments.mean.numpy(), np.hstack(alone).mean(0), rtol=1e-6, atol=1e-6)


def test_a_cache_of_few_layers_and_one_without_the_norm_are_others(tmp_path):
    model = RDModel.from_pretrained("esm2-rd-mini", level="90K")
    caches = [Cache(tmp_path, model, most, norm) for most, norm in product((1, 2, 8), (True, False))]
    assert len({cache.folder for cache in caches[1:]}) == 5
    assert list(caches[0].widths) == ["28K@2", "90K@3"]
    assert list(caches[2].widths) == ["28K@1", "28K@2", "90K@2", "90K@3"]


def test_samples_are_disjoint_and_hold_nothing_that_is_asked_about(small):
    path = small / "natural50_train.fasta.xz"
    everything = [each.sequence for each in Fasta(path)]
    asked = set(everything[:10])
    samples = disjoint_samples(path, asked, 9)
    together = [sequence for sample in samples for sequence in sample]
    assert [len(sample) for sample in samples] == [9] * 5
    assert len(set(together)) == 45
    assert not asked & set(together)
    assert [len(part) for part in cut_at(samples[0], [2, 5, 9])] == [2, 3, 4]
    assert list(chain.from_iterable(cut_at(samples[0], [2, 5, 9]))) == samples[0]


def test_halves_are_halves_and_structure_is_judged_by_other_proteins(small):
    one, other = halves(101, 3)
    assert sorted([*one, *other]) == list(range(101))
    assert abs(len(one) - len(other)) == 1
    assert (halves(101, 3)[0] == one).all()
    assert (halves(101, 4)[0] != one).any()
    data = structure_set(small)
    ends = np.cumsum([len(each) for each in data.sequences])
    assert ends[-1] == len(data.labels)
    taught = [set(np.searchsorted(ends, rows, side="right")) for rows, _ in data.splits]
    judged = [set(np.searchsorted(ends, rows, side="right")) for _, rows in data.splits]
    assert len(set.union(*taught)) == sum(map(len, taught)) == 10
    assert judged == [set(range(10, 14))] * 5
    assert all((data.labels[np.concatenate(split)] >= 0).all() for split in data.splits)
    assert (data.labels < 0).sum() >= 14
    melting = melting_set(small)
    ((known, unknown),) = melting.splits
    assert (known.tolist(), unknown.tolist()) == (list(range(60)), list(range(60, 80)))
    assert [each.name for each in read_sets(small, None, 100)][-2:] == [
        "secondary structure",
        "melting temperature",
    ]


def test_proteingyms_files_are_read_and_split_by_mutations(tmp_path, capsys):
    singles = [[f"A{k}G", f"M{k}", k] for k in range(120)]
    triples = [["A1G:C2D:E3F:G4H", "MM", k] for k in range(100)]
    columns = ["mutant", "mutated_sequence", "DMS_score"]
    write_csv(tmp_path / "DMS_substitutions.csv", ["DMS_id", "x"], [["one", 1], ["long", 1], ["missing", 1]])
    write_csv(tmp_path / "tables" / "one.csv", columns, [*singles, *triples, ["A1G:C2D", "MA", 0]])
    write_csv(tmp_path / "long.csv", columns, [["A1G", "M" * 1_023, 0]])
    ((name, variants),) = proteingym_assays(tmp_path)
    assert "3 assays, 1 without a table" in capsys.readouterr().out
    sets = list(mutation_sets(name, variants, 110))
    assert [each.name for each in sets] == ["one, 1 mutation", "one, 3 or more mutations"]
    assert [len(each.sequences) for each in sets] == [110, 100]
    for number, sequence in zip(sets[0].labels, sets[0].sequences, strict=True):
        assert sequence == f"M{number:.0f}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected ProteinGym's DMS_substitutions.csv in .*, got none"),
        ({"DMS_substitutions": "id\nx\n"}, "expected columns DMS_id in .*DMS_substitutions.csv, got id"),
        ({"DMS_substitutions": ""}, "expected columns DMS_id in .*, got none"),
        ({"DMS_substitutions": "DMS_id\nx\n"}, "expected tables of the 1 assays in .*, got none: DMS_id.csv"),
        (
            {"DMS_substitutions": "DMS_id\nx\n", "x": "mutant\nA1G\n"},
            "expected columns mutant, mutated_sequence, DMS_score in .*x.csv, got mutant",
        ),
    ],
)
def test_a_folder_that_is_not_proteingyms_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        list(proteingym_assays(tmp_path))


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        ("K1G", "expected K at position 1 of the wild type, got M"),
        ("K9G", "expected K at position 9 of the wild type, got no such position"),
        ("K0G", "expected K at position 0 of the wild type, got no such position"),
    ],
)
def test_a_mutant_of_another_wild_type_is_refused(mutant, message):
    assert mutate("MKV", "K2R:V3A") == "MRA"
    with pytest.raises(ValueError, match=message):
        mutate("MKV", mutant)


def test_a_chain_of_one_level_is_refused(small, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [scaling.__file__, "--data", str(small), "--level", "28K", "--sizes", "4"]
    )
    with pytest.raises(SystemExit, match="expected a chain of two levels or more, got 28K alone"):
        scaling.main()


def test_a_group_of_few_data_sets_has_no_shares_of_its_own():
    def records(task, count):
        return [
            record_of(Place(approach.name, level), f"{task} {number}", task, head)
            for number in range(count)
            for approach in RIVALS
            for level in LEVELS
            for head in ("linear", "MLP")
        ]

    few = [record for task in TASKS for record in records(task, 1)]
    many = few + records(MUTATIONS[2], LEAST_SETS)
    groups = [
        list(dict.fromkeys(row["data sets"] for row in all_win_rows(each, LEVELS))) for each in (few, many)
    ]
    assert groups == [["all, 5"], ["2 mutations, 5", "mutations, 7", "all, 9"]]


def test_data_that_is_not_enough_is_refused(small, monkeypatch):
    with pytest.raises(SystemExit, match=r"expected 5 samples of 13 sequences in .*, got 60 sequences"):
        disjoint_samples(small / "natural50_train.fasta.xz", set(), 13)
    (small / "dms" / "other.csv.gz").touch()
    with pytest.raises(SystemExit, match="expected other among the wild types, got DLG4"):
        read_sets(small, None, 100)
    for path in (small / "dms").glob("*.csv.gz"):
        path.unlink()
    with pytest.raises(
        SystemExit, match="expected an assay with 100 variants of 1, 2, or 3 or more mutations"
    ):
        read_sets(small, None, 100)
    with pytest.raises(SystemExit, match="expected at least 100 --variants of a data set, got 99"):
        read_sets(small, None, 99)
    for sizes in (["5", "4"], ["4", "4"], ["0", "4"]):
        monkeypatch.setattr(sys, "argv", [scaling.__file__, "--sizes", *sizes])
        with pytest.raises(
            SystemExit, match=f"expected rising --sizes, each at least 1, got {' '.join(sizes)}"
        ):
            scaling.main()
    monkeypatch.delenv("RD_TORCH_DATA")
    monkeypatch.setattr(sys, "argv", [scaling.__file__])
    with pytest.raises(
        SystemExit, match="expected the folder of the protein data in --data or RD_TORCH_DATA"
    ):
        scaling.main()
