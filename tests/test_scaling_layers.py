"""`benchmarks/scaling/`, maps and choices: planted layers are found, and no choice sees what judges."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.scaling import probes
from benchmarks.scaling.approaches import (
    ALL_LAST,
    LABELS,
    NESTED_CHOSEN,
    NESTED_LAST,
    PCA_LAST,
    PLAIN_BEST,
    PLAIN_LAST,
    RIVALS,
    Approach,
)
from benchmarks.scaling.criteria import CRITERIA, at_depth, choose_apart, choose_greedily
from benchmarks.scaling.data import MUTATIONS, DataSet, halves
from benchmarks.scaling.layers import last_layers, layers_by_level, level_of, spread
from benchmarks.scaling.maps import (
    ALL,
    BY_BLOCK,
    BY_FEATURE,
    CENTRED,
    CONCAT,
    NESTED,
    PCA,
    PLAIN,
    Affine,
    Recipe,
    Solver,
    explained_by_prefix,
)
from benchmarks.scaling.probes import Rows
from benchmarks.scaling.records import Place, means_of
from benchmarks.scaling.study import Fit, Sample, Study
from benchmarks.scaling.wins import EQUAL, WIDER, win_rows
from rd_torch import RunningMoments, concat_pca, solve_stages

WIDTHS = {"a@1": 6, "a@2": 6, "b@1": 10, "b@2": 10, "c@1": 14, "c@2": 14, "c@3": 14}
LAST = ["a@2", "b@2", "c@3"]
LEVELS = ["a", "b", "c"]
TOTAL = sum(WIDTHS.values())
BLOCKS = dict(zip(WIDTHS, pairwise(np.cumsum([0, *WIDTHS.values()])), strict=True))


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(rows, seed):
    """Raw embeddings of all layers side by side: shared latents of falling strength, noise, and means.

    The first feature of each layer varies by itself.
    """
    mixing = np.random.default_rng(99).normal(size=(8, TOTAL)) * 2 / np.arange(1, 9)[:, None]
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(rows, TOTAL))
    own[:, [start for start, _ in BLOCKS.values()]] *= 4
    return rng.normal(size=(rows, 8)) @ mixing + own + np.arange(TOTAL)


def layer_of(rows, layer):
    return rows[:, slice(*BLOCKS[layer])]


def solver_of(rows, widths=WIDTHS):
    moments = RunningMoments(sum(widths.values()))
    moments.update(torch.as_tensor(rows))
    return Solver(moments, widths)


class Drawn:
    """A cache of raw embeddings that no model made."""

    widths, device = WIDTHS, torch.device("cpu")

    def __init__(self, folder):
        self.folder = folder
        self.costs = {layer: 100 * number for number, layer in enumerate(WIDTHS, start=1)}

    def rows(self, data):
        return torch.from_numpy(draw(len(data.labels), int(data.name))).float()

    def moments(self, sequences, name):
        return solver_of(draw(len(sequences), 1_000)).moments


def set_of(number, labels, classes=0):
    return DataSet(str(number), MUTATIONS[1], [str(number)], labels, [halves(240, 0)], classes)


def measured(folder, labels, approaches=RIVALS):
    """Scores of forty data sets whose labels a function gives, by data set and place with the linear head."""

    sets = [set_of(number, labels(draw(240, number), number)) for number in range(40)]
    study, sample = Study(Drawn(folder), sets), Sample("drawn", (["M"] * 2_000,))
    linear = [Approach(each.name, each.kind, each.choice) for each in approaches]
    (records,) = study.run([Fit(sample, study.solver(sample), linear)])
    return records


def noise(rows, number):
    return np.random.default_rng([number]).normal(size=len(rows))


def test_random_labels_give_no_correlation_and_win_shares_near_one_half(tmp_path):
    means = means_of(measured(tmp_path, noise))
    for approach in RIVALS:
        for level in LEVELS:
            assert abs(np.mean([scores[Place(approach.name, level)] for scores in means.values()])) < 0.05
    rows = win_rows(means, LEVELS)
    assert len(rows) == len(WIDER) + len(EQUAL)
    holding = 0
    for row in rows:
        share, rest = row["all levels"].split(" ", 1)
        low, high = map(float, rest.strip("[]").split(", "))
        assert 0.3 < float(share) < 0.7
        assert low <= float(share) <= high
        holding += low <= 0.5 <= high
    assert holding >= len(rows) - 2  # one in twenty may miss


def test_a_signal_in_the_added_block_alone_is_found_by_wider_and_not_by_narrower(tmp_path):
    solver = solver_of(draw(2_000, 1_000))
    columns, matrix, _ = solver.map_of(solver.recipe(NESTED, LAST))
    planted = matrix[:, WIDTHS["b@2"] :].sum(1).numpy()
    means = means_of(measured(tmp_path, lambda rows, number: rows[:, columns] @ planted))
    for scores in means.values():
        assert scores[Place(NESTED_LAST, "c")] > 0.95
        assert scores[Place(ALL_LAST, "c")] > 0.95
        assert scores[Place(NESTED_LAST, "b")] < 0.6
    # Components of little variance predict nothing, so that a little of them is left in the added block.
    assert abs(np.mean([scores[Place(PLAIN_LAST, "a")] for scores in means.values()])) < 0.25


def test_a_signal_in_a_middle_layer_is_found_by_the_choice_and_by_nothing_else(tmp_path):
    solver = solver_of(draw(2_000, 1_000))
    columns, own = solver.columns([layer for layer in WIDTHS if layer != "c@2"]), solver.columns(["c@2"])[:1]
    inside, cross = (solver.covariance[columns[:, None], each] for each in (columns, own))
    W = torch.linalg.solve(inside, cross).numpy()

    def labels(rows, number):  # what no other layer knows of a feature
        return rows[:, int(own)] - rows[:, columns] @ W[:, 0]

    records = measured(tmp_path, labels)
    by_labels = [approach.name for approach in RIVALS if approach.choice == LABELS]
    for record in records:
        if record.level == "c":
            assert record.layers[-1] == ("c@2" if record.approach in by_labels else "c@3"), record.approach
    means = means_of(records)
    average = {
        name: np.mean([scores[Place(name, "c")] for scores in means.values()])
        for name in (PLAIN_BEST, PLAIN_LAST, NESTED_LAST, NESTED_CHOSEN, PCA_LAST)
    }
    assert average[PLAIN_BEST] > 0.7
    assert average[NESTED_CHOSEN] > average[NESTED_LAST] + 0.3
    assert max(abs(average[name]) for name in (PLAIN_LAST, PCA_LAST, NESTED_LAST)) < 0.1


def test_each_score_is_that_of_its_own_head(tmp_path):
    data = set_of(3, noise(draw(240, 3), 3))
    study, sample = Study(Drawn(tmp_path), [data]), Sample("drawn", (["M"] * 500,))
    heads = (probes.NEAREST, probes.LINEAR)
    (records,) = study.run([Fit(sample, study.solver(sample), [Approach("plain", PLAIN, heads=heads)])])
    assert len(records) == len(LAST) * len(heads)
    rows, labels = torch.from_numpy(draw(240, 3)).float().double(), torch.from_numpy(data.labels)
    for record in records:
        features = layer_of(rows, *record.layers)
        parts = [Rows(features[part], labels[part]) for part in data.splits[0]]
        expected = probes.judge(record.head, *parts, 0, 0)["Spearman"]
        assert record.scores["Spearman"] == pytest.approx(expected, abs=1e-6)


def test_several_processes_give_the_scores_of_one(tmp_path):
    approaches = [each for each in RIVALS if each.name in (PLAIN_LAST, NESTED_CHOSEN)]
    found = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        torch.set_num_threads(threads)
        found.append(measured(folder, noise, approaches))
    assert found[0] == found[1]


def choices(folder, labels, classes=0, part="taught"):
    """What every approach that goes by labels takes, and what where labels of one half are noise."""

    def of(labels):
        data = set_of(7, labels, classes)
        study, sample = Study(Drawn(folder), [data]), Sample("drawn", (["M"] * 500,))
        approaches = [Approach(kind, kind, LABELS) for kind in (PLAIN, NESTED, ALL, CONCAT)]
        (records,) = study.run([Fit(sample, study.solver(sample), approaches)])
        return [(record.approach, record.layers) for record in records]

    changed = labels.copy()
    rows = dict(zip(("taught", "judged"), halves(240, 0), strict=True))[part]
    rng = np.random.default_rng(3)
    changed[rows] = rng.integers(classes, size=120) if classes else 100 * rng.normal(size=120)
    return of(labels), of(changed)


def middle_labels(classes):
    """Labels that layers a@1, b@1 and c@2 know best."""
    rows = draw(240, 7)
    own = sum(
        layer_of(rows, layer)[:, 0] - layer_of(rows, layer)[:, 0].mean() for layer in ("a@1", "b@1", "c@2")
    )
    return np.digitize(own, np.quantile(own, (1 / 3, 2 / 3))) if classes else own


@pytest.mark.parametrize("classes", [0, 3])
def test_no_choice_sees_labels_of_rows_that_judge(tmp_path, classes):
    labels = middle_labels(classes)
    one, other = choices(tmp_path, labels, classes, "judged")
    assert one == other
    assert ("nested", ("a@1", "b@1", "c@2")) in one
    one, other = choices(tmp_path, labels, classes, "taught")
    assert one != other


def test_a_choice_that_sees_rows_that_judge_is_caught(tmp_path, monkeypatch):
    def leaking(self, solver, recipe, part):
        everything = torch.arange(240)  # of rows that judge too
        return Rows(solver.map_of(recipe)(self.rows, everything), self._labels[everything])

    monkeypatch.setattr("benchmarks.scaling.study._Known.part", leaking)
    one, other = choices(tmp_path, middle_labels(0), 0, "judged")
    assert one != other


def test_scores_of_other_labels_are_not_taken_for_these(tmp_path):
    measured(tmp_path, noise)
    means = means_of(measured(tmp_path, lambda rows, number: layer_of(rows, "a@2")[:, 0]))
    assert min(scores[Place(PLAIN_LAST, "a")] for scores in means.values()) > 0.99


def test_a_samples_moments_are_those_of_all_its_parts(tmp_path):
    study = Study(Drawn(tmp_path), [])
    moments = study.solver(Sample("some", (["M"] * 30, ["M"] * 20))).moments
    together = solver_of(np.concatenate((draw(30, 1_000), draw(20, 1_000)))).moments
    assert moments.count == 50
    torch.testing.assert_close(moments.covariance(), together.covariance())


def test_every_recipe_is_what_its_stages_make_of_raw_embeddings():
    rows, raw = draw(2_000, 1_000), torch.from_numpy(draw(50, 1))
    solver = solver_of(rows)
    layers = ["a@1", "b@2", "c@1"]
    a, b, c = (layer_of(raw, layer) for layer in layers)
    for kind, solve, options in (
        (NESTED, solve_stages, {}),
        (ALL, solve_stages, {"added": "all"}),
        (CONCAT, concat_pca, {}),
    ):
        first, second = solve(solver.moments, WIDTHS, levels=layers, **options)
        recipe = solver.recipe(kind, layers)
        made = solver.map_of(recipe)(raw)
        assert made.shape[1] == recipe.width == (30 if kind == ALL else 14)
        torch.testing.assert_close(made, second(first(a, b), c))
        torch.testing.assert_close(
            solver.map_of(recipe)(raw.mean(0, keepdim=True)), made.mean(0, keepdim=True)
        )
        torch.testing.assert_close(solver.map_of(recipe)(raw, torch.tensor([3, 1])), made[[3, 1]])
        if kind != CONCAT:  # the shorter chain is the beginning
            torch.testing.assert_close(solver.map_of(solver.recipe(kind, layers[:2]))(raw), first(a, b))
    more = solver.map_of(Recipe(NESTED, tuple(layers), 17))(raw)
    torch.testing.assert_close(more[:, :14], solver.map_of(solver.recipe(NESTED, layers))(raw))
    torch.testing.assert_close(solver.map_of(solver.recipe(PLAIN, ["b@2"]))(raw), b)
    rotated = solver.map_of(solver.recipe(PCA, ["b@2"]))
    torch.testing.assert_close(rotated(raw) @ rotated(raw).T, b @ b.T)  # the same angles and lengths
    spread_of = rotated(torch.from_numpy(rows)).T.cov()
    torch.testing.assert_close(spread_of, spread_of.diagonal().sort(descending=True).values.diag())
    narrow = solver.map_of(Recipe(PCA, ("b@2",), 4))(raw)
    torch.testing.assert_close(narrow, rotated(raw)[:, :4])


def test_rivals_are_of_the_widths_and_layers_that_their_names_say():
    solver = solver_of(draw(200, 0))
    chosen = ("a@1", "b@2", "c@2")
    made = {each.name: each.recipes(solver, chosen) for each in RIVALS}
    for name, recipes in made.items():
        assert list(recipes) == LEVELS
        for level, recipe in recipes.items():
            until = chosen[: LEVELS.index(level) + 1]
            sizes = [WIDTHS[layer] for layer in until]
            assert recipe.width == (sum(sizes) if name.startswith("all") else sizes[-1])
            if name.startswith("PCA"):
                assert recipe.layers == ("c@2",)
            elif name.startswith("plain"):
                assert recipe.layers == until[-1:]
            else:
                assert recipe.layers == until
    assert {each.kind for each in RIVALS if each.choice == LABELS} == {PLAIN, PCA, NESTED, ALL}


def test_scales_are_those_of_the_moments_and_only_neighbours_see_them():
    rows = torch.from_numpy(draw(500, 1))
    solver = solver_of(rows)
    plain, centred, feature, block = (
        solver.map_of(solver.recipe(NESTED, LAST, scale))(rows)
        for scale in ("", CENTRED, BY_FEATURE, BY_BLOCK)
    )
    torch.testing.assert_close(centred, plain - plain.mean(0))
    torch.testing.assert_close(feature, centred / plain.std(0))
    for start, end in ((0, 6), (6, 10), (10, 14)):
        part = plain[:, start:end]
        expected = centred[:, start:end] / part.var(0).mean().sqrt()
        torch.testing.assert_close(block[:, start:end], expected)
    labels = rows[:, 0] + rows[:, -1]

    def score(head, features):
        parts = (Rows(features[part], labels[part]) for part in (slice(300), slice(300, None)))
        return probes.judge(head, *parts, 0, 0)["Spearman"]

    assert len({round(score("linear", each), 6) for each in (plain, centred, feature, block)}) == 1
    assert len({round(score("nearest", each), 6) for each in (plain, centred, feature, block)}) == 4


def test_neighbours_are_those_of_largest_cosine():
    known = torch.eye(4, dtype=torch.float64).repeat_interleave(10, 0) * torch.arange(1, 41)[:, None]
    labels = torch.arange(4).repeat_interleave(10)
    unknown = torch.tensor([[0.0, 0.1, 0, 0], [0, 0, 0, 50.0]], dtype=torch.float64)
    shares, _ = probes.nearest(known, labels, unknown, 4, 0)
    assert shares.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    numbers, _ = probes.nearest(known, labels.double(), unknown, 0, 0)
    assert numbers.tolist() == [1, 3]


@pytest.mark.parametrize("classes", [0, 3])
def test_the_expected_error_is_the_least_generalised_cross_validation_error(classes):
    X = draw(100, 3)
    y = np.digitize(X[:, 0], (-1, 1)) if classes else X[:, 0] + 2 * np.random.default_rng(0).normal(size=100)
    Z = (X - X.mean(0)) / X.std(0, ddof=1)
    Y = np.eye(3)[y] if classes else y[:, None]
    errors = []
    for alpha in probes.PENALTIES:
        hat = Z @ np.linalg.inv(Z.T @ Z + alpha * np.eye(TOTAL)) @ Z.T + 1 / 100
        errors.append(100 * ((Y - hat @ Y) ** 2).sum() / (100 - np.trace(hat)) ** 2)
    rows = Rows(torch.from_numpy(X), torch.from_numpy(y))
    assert probes.expected_error(rows, classes) == pytest.approx(min(errors))


def test_all_directions_by_least_squares_score_as_the_concatenation_does_without_a_penalty():
    rows = torch.from_numpy(draw(300, 2))
    labels = rows[:, ::5].sum(1) + torch.from_numpy(np.random.default_rng(0).normal(size=300))
    solver = solver_of(draw(2_000, 1_000))
    nested = solver.map_of(solver.recipe(ALL, LAST))
    identity = torch.eye(len(nested.columns), dtype=torch.float64)
    predictions = []
    for affine in (nested, Affine(nested.columns, identity, identity[0] * 0)):
        known, unknown = probes.standardise(affine(rows[:150]), affine(rows[150:]))
        predictions.append(probes.fit_ridge(known, labels[:150], penalties=(0.0,))(unknown))
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-8)


def test_what_the_first_features_explain_is_their_regressions_share_of_the_variance():
    rows = draw(2_000, 1_000)[:, -14:]
    solver = solver_of(rows, {"c@1": 14})
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(14, 9)))
    explained = explained_by_prefix(matrix, solver.covariance)
    centred = rows - rows.mean(0)
    features = centred @ matrix.numpy()
    for k in (0, 1, 7, 9):
        fit = features[:, :k] @ np.linalg.lstsq(features[:, :k], centred, rcond=None)[0]
        assert explained[k] == pytest.approx((fit**2).sum() / (centred**2).sum(), abs=1e-9)


def test_layers_are_spread_over_a_backbone_with_the_last_among_them():
    assert spread(6, 8) == [1, 2, 3, 4, 5, 6]
    assert spread(6, 1) == [6]
    assert spread(33, 3) == [11, 22, 33]
    assert all(len(set(spread(36, most))) == most for most in range(1, 37))
    assert layers_by_level(WIDTHS) == {"a": ["a@1", "a@2"], "b": ["b@1", "b@2"], "c": ["c@1", "c@2", "c@3"]}
    assert last_layers(WIDTHS) == LAST
    assert level_of("28K@2") == "28K"


def test_choices_go_from_the_smallest_backbone_on_and_take_the_deepest_of_equal_layers():
    worth = {"a@1": 2, "a@2": 1, "b@1": 1, "b@2": 1, "c@1": 3, "c@2": 4, "c@3": 0}
    seen = []

    def value(chosen):
        seen.append(chosen)
        return worth[chosen[-1]]

    assert choose_greedily(WIDTHS, value) == ("a@1", "b@2", "c@2")
    assert {chosen[:-1] for chosen in seen} == {(), ("a@1",), ("a@1", "b@2")}
    seen.clear()
    assert choose_apart(WIDTHS, value) == ("a@1", "b@2", "c@2")
    assert {len(chosen) for chosen in seen} == {1}
    moments = solver_of(draw(50, 0)).moments
    assert at_depth(0.5)(moments, WIDTHS) == ("a@1", "b@1", "c@2")
    assert at_depth(1)(moments, WIDTHS) == tuple(LAST)


def test_criteria_find_the_layers_that_were_planted_for_them():
    rng = np.random.default_rng(0)
    rows, small = draw(4_000, 0), rng.normal(size=(4_000, 6))
    copy = np.hstack((small @ rng.normal(size=(6, 10)), small @ rng.normal(size=(6, 14))))
    for layer, block in (
        ("a@1", small),
        ("a@2", small * 10 ** -np.arange(6.0)),  # of low rank
        ("b@1", copy[:, :10]),  # known already
        ("b@2", rng.normal(size=(4_000, 10))),  # new
        ("c@1", rng.normal(size=(4_000, 14))),
        ("c@2", copy[:, 10:]),
        ("c@3", rng.normal(size=(4_000, 14)) * 3 ** -np.arange(14.0)),
    ):
        rows[:, slice(*BLOCKS[layer])] = block
    moments = solver_of(rows).moments
    found = {name: tuple(criterion(moments, WIDTHS)) for name, criterion in CRITERIA.items()}
    assert found["most predicted"] == ("a@1", "b@1", "c@2")
    assert found["least predicted"][:2] == ("a@1", "b@2")
    assert found["most added"][:2] == ("a@1", "b@2")
    for name in ("effective rank, layer", "participation ratio, layer", "effective rank, residual"):
        assert found[name] == ("a@1", "b@2", "c@1")
    assert found["most of all layers"][1] == "b@2"
    assert found["most predicted and added"][1] == "b@1"
