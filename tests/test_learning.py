"""What is learnt from labels: planted signals, leaks, splits, scores, heads against scikit-learn."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, log_loss, r2_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

from rd_torch.learning import HEADS_OF, SETTINGS, Judge, Rows, Score, fit_heads, select
from rd_torch.learning.examples import Examples
from rd_torch.learning.scoring import NAMES
from rd_torch.learning.selecting import narrowest
from rd_torch.learning.splitting import Split
from rd_torch.learning.vectors import Source, labels_of

WIDTHS = [8, 16, 32]


def rows_of(labels, features, task="regression", outputs=1, groups=None):
    groups = np.arange(len(labels)) if groups is None else groups
    return Rows(task, labels, outputs, groups, lambda width: features[:, :width])


def planted(place, seed=0, count=300, noise=0.5):
    """Features of noise, one of which makes the labels."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, WIDTHS[-1]))
    return features, 3 * features[:, place] + noise * generator.normal(size=count)


def folds_of(count, folds=5):
    return np.arange(count) % folds


@pytest.mark.parametrize(("place", "width"), [(3, 8), (12, 16), (30, 32)])
@pytest.mark.parametrize("kind", ["ridge", "knn"])
def test_a_signal_in_a_block_is_found_at_that_width_and_not_before(place, width, kind):
    features, labels = planted(place)
    if kind == "knn":  # neighbours see a signal that is larger than the noise around it
        features = features * np.where(np.arange(WIDTHS[-1]) == place, 1, 0.01)
    found = select(rows_of(labels, features), folds_of(300), kind, WIDTHS)
    assert found.widths[found.chosen].width == width
    scores = {each.width: each.score.value for each in found.widths}
    assert all(score < 0.1 for narrower, score in scores.items() if narrower < width)
    if kind == "ridge":
        assert found.score.value > 0.9


@pytest.mark.parametrize(("place", "width"), [(3, 8), (12, 16), (30, 32)])
def test_planted_classes_are_found_at_their_width(place, width):
    features, labels = planted(place)
    classes = np.digitize(labels, np.quantile(labels, [1 / 3, 2 / 3]))
    found = select(rows_of(classes, features, "classification", 3), folds_of(300), "logistic", WIDTHS)
    assert found.widths[found.chosen].width == width
    scores = {each.width: each.score.value for each in found.widths}
    assert all(score < 0.45 for narrower, score in scores.items() if narrower < width)
    assert found.score.value > 0.75


@pytest.mark.parametrize(("place", "width"), [(3, 8), (30, 32)])
def test_planted_labels_of_which_a_row_has_several_are_found_at_their_width(place, width):
    features, labels = planted(place)
    several = np.stack([labels > 0, labels > 2], 1)
    found = select(rows_of(several, features, "multilabel", 2), folds_of(300), "logistic", WIDTHS)
    assert found.widths[found.chosen].width == width
    assert found.score.value > 0.5
    assert found.widths[0].score.value > 0.5 or width > 8


@pytest.mark.parametrize("task", list(HEADS_OF))
def test_shuffled_labels_give_nothing(task):
    values = []
    for seed in range(5):
        features, labels = planted(3, seed)
        labels = np.random.default_rng(seed).permutation(labels)
        if task == "classification":
            labels = (labels > 0).astype(int)
        elif task == "multilabel":
            labels = np.stack([labels > 0, labels > 1], 1)
        outputs = {"regression": 1, "classification": 2, "multilabel": 2}[task]
        rows = rows_of(labels, features, task, outputs)
        found = select(rows, folds_of(300), HEADS_OF[task][0], WIDTHS)
        values.append(found.score.value - (0.5 if task == "classification" else 0))
        assert found.score.interval[0] < (0.5 if task == "classification" else 0.02)
    assert abs(np.mean(values)) < 0.05


@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task in HEADS_OF for kind in HEADS_OF[task]])
def test_no_label_of_a_fold_has_a_part_in_what_is_predicted_there(task, kind):
    """Whatever the labels of a fold are, its predictions are the same to the bit: nothing has seen them."""
    features, labels = planted(12, count=90)
    generator = np.random.default_rng(1)
    if task == "classification":
        labels = np.digitize(labels, [-1, 1])
    elif task == "multilabel":
        labels = np.stack([labels > 0, labels > 1], 1)
    outputs = {"regression": 1, "classification": 3, "multilabel": 2}[task]
    folds = folds_of(90, 3)
    before = select(rows_of(labels, features, task, outputs), folds, kind, [8, 16])
    for fold in range(3):
        own, other = folds == fold, labels.copy()
        other[own] = generator.permutation(other[own])[::-1]
        assert not np.array_equal(other, labels)
        after = select(rows_of(other, features, task, outputs), folds, kind, [8, 16])
        assert np.array_equal(before.predictions[own], after.predictions[own])
        for one, two in zip(before.widths, after.widths, strict=True):
            assert np.array_equal(one.predictions[own], two.predictions[own])


def test_two_folds_are_too_few():
    features, labels = planted(3, count=40)
    with pytest.raises(ValueError, match="expected 3 folds or more, got 2"):
        select(rows_of(labels, features), folds_of(40, 2), "ridge", WIDTHS)


def test_the_narrowest_width_within_one_standard_error_is_taken():
    samples = np.random.default_rng(0).normal(size=500) * 0.01
    wide, near, far = Score(0.5, 0.5 + samples), Score(0.495, 0.495 - samples), Score(0.4, 0.4 + samples)
    assert narrowest([far, near, wide]) == 1
    assert narrowest([far, wide, near]) == 1
    assert narrowest([Score(0.5, wide.samples), wide]) == 0


@pytest.mark.parametrize("task", list(NAMES))
def test_scores_are_scikit_learns(task):
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 30, 200)
    if task == "regression":
        labels, predictions = generator.normal(size=200) + 1e5, generator.normal(size=(200, 1)) + 1e5
        expected = r2_score(labels, predictions)
    elif task == "classification":
        labels, predictions = generator.integers(0, 3, 200), generator.random((200, 3))
        expected = balanced_accuracy_score(labels, predictions.argmax(1))
    else:
        labels, predictions = generator.random((200, 2)) < [0.3, 0.6], generator.random((200, 2))
        frequencies = np.broadcast_to(labels.mean(0), labels.shape)
        loss, null = (
            sum(log_loss(labels[:, k], each[:, k]) for k in range(2)) for each in (predictions, frequencies)
        )
        expected = 1 - loss / null
    judge = Judge(task, labels, groups)
    score = judge.score(predictions, np.arange(200))
    assert score.value == judge.value(predictions, np.arange(200)) == pytest.approx(expected, abs=1e-9)
    low, high = score.interval
    assert low < score.value < high


def test_intervals_are_over_groups_and_not_over_rows():
    generator = np.random.default_rng(0)
    labels, errors = generator.normal(size=40), generator.normal(size=40)
    predictions = (labels + errors)[:, None]
    alone = Judge("regression", labels, np.arange(40)).score(predictions, np.arange(40))
    copied = Judge("regression", np.repeat(labels, 10), np.repeat(np.arange(40), 10))
    copies = copied.score(np.repeat(predictions, 10, 0), np.arange(400))
    assert copies.value == pytest.approx(alone.value)
    assert np.subtract(*copies.interval) == pytest.approx(np.subtract(*alone.interval))


@pytest.mark.parametrize("width", [5, 60])
def test_ridge_is_scikit_learns(width):
    generator = np.random.default_rng(0)
    X, y = generator.normal(3, 2, size=(40, width)), generator.normal(10, 1, size=40)
    X[:, 2] = 7  # a constant feature
    scaled = StandardScaler().fit(X)
    for penalty, head in zip(SETTINGS["ridge"], fit_heads("ridge", "regression", X, y, 1), strict=True):
        expected = Ridge(penalty).fit(scaled.transform(X), y).predict(scaled.transform(X + 1))
        shifted = X + 1
        np.testing.assert_allclose(head(shifted)[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", [2, 3])
def test_logistic_regression_is_scikit_learns(outputs):
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(90, 6)), np.arange(90) % outputs
    X[:, 0] += y
    scaled = StandardScaler().fit_transform(X)
    heads = fit_heads("logistic", "classification", X, y, outputs)
    for penalty, head in zip(SETTINGS["logistic"], heads, strict=True):
        expected = LogisticRegression(C=1 / penalty, max_iter=1_000).fit(scaled, y).predict_proba(scaled)
        np.testing.assert_allclose(head(X), expected, rtol=0, atol=2e-3)
        np.testing.assert_allclose(head(X).sum(1), 1)


def test_labels_of_which_a_row_has_several_are_each_predicted_alone():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(90, 6))
    Y = np.stack([X[:, 0] > 0, X[:, 1] > 0.5, np.ones(90, bool)], 1)
    scaled = StandardScaler().fit_transform(X)
    head = fit_heads("logistic", "multilabel", X, Y, 3)[2]
    expected = LogisticRegression(C=1 / SETTINGS["logistic"][2], max_iter=1_000).fit(scaled, Y[:, 1])
    np.testing.assert_allclose(head(X)[:, 1], expected.predict_proba(scaled)[:, 1], rtol=0, atol=2e-3)
    assert (head(X)[:, 2] > 0.999).all()


def test_neighbours_are_scikit_learns():
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(60, 4)), generator.normal(size=60)
    new = generator.normal(size=(20, 4))
    scaled = StandardScaler().fit(X)
    classes = (y > 0).astype(int)
    both = zip(
        fit_heads("knn", "regression", X, y, 1),
        fit_heads("knn", "classification", X, classes, 2),
        strict=True,
    )
    for number, (one, other) in zip(SETTINGS["knn"], both, strict=True):
        expected = KNeighborsRegressor(number).fit(scaled.transform(X), y).predict(scaled.transform(new))
        np.testing.assert_allclose(one(new)[:, 0], expected, atol=1e-6)
        shares = KNeighborsClassifier(number).fit(scaled.transform(X), classes)
        np.testing.assert_allclose(other(new), shares.predict_proba(scaled.transform(new)), atol=1e-6)


def test_networks_and_processes_are_scikit_learns():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 4))
    y = X[:, 0] ** 2 + 5
    new = generator.normal(size=(20, 4))
    scaled = StandardScaler().fit(X)
    head = fit_heads("mlp", "regression", X, y, 1)[0]
    model = MLPRegressor(
        hidden_layer_sizes=(64,),
        alpha=SETTINGS["mlp"][0],
        early_stopping=True,
        random_state=0,
        max_iter=300,
    ).fit(scaled.transform(X), (y - y.mean()) / y.std())
    expected = model.predict(scaled.transform(new)) * y.std() + y.mean()
    np.testing.assert_allclose(head(new)[:, 0], expected, atol=1e-9)
    process = fit_heads("gp", "regression", X, y, 1)[0]
    kernel = ConstantKernel() * RBF(2, (0.1, 1e4)) + WhiteKernel()
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(scaled.transform(X), y)
    np.testing.assert_allclose(process(new)[:, 0], model.predict(scaled.transform(new)), atol=1e-6)
    assert r2_score(new[:, 0] ** 2 + 5, process(new)[:, 0]) > 0.5
    with pytest.raises(ValueError, match="expected at most 1,000 rows for a Gaussian process, got 1,001"):
        fit_heads("gp", "regression", np.zeros((1001, 2)), np.arange(1001.0), 1)


@pytest.mark.parametrize("kind", HEADS_OF["classification"])
def test_a_class_that_is_not_taught_is_refused(kind):
    features, labels = planted(3, count=60)
    classes = np.where(labels > 0, 2, 0)
    with pytest.raises(ValueError, match="expected each of 3 classes among the labels that teach, got 2"):
        fit_heads(kind, "classification", features, classes, 3)


@pytest.mark.parametrize("most", [7, 1_000])
def test_every_label_of_a_residue_stands_beside_the_embedding_of_that_residue(monkeypatch, most):
    monkeypatch.setattr("rd_torch.learning.vectors.MOST_ROWS", most)
    labels = [np.array(each) for each in ([-1, 0, 1], [1], [-1, -1], [0, 1, -1, 1, 0], [1, 1])]
    vectors = [100.0 * number + np.arange(len(each))[:, None] for number, each in enumerate(labels)]
    sequences = ["A" * len(each) for each in labels]
    examples = Examples(sequences, "classification", ["a", "b"], labels, True, None, "", "")
    folds = np.array([0, 1, 2, -1, 2])
    split = Split(folds, np.array([5, 6, 7, 8, 9]), "")
    for chosen in (folds >= 0, folds < 0, np.ones(5, bool)):
        found = labels_of(Source(None, "", {}, "none", [1]), examples, split, vectors, chosen)
        whose, where = np.divmod(found.rows.cut(1)[:, 0].astype(int), 100)
        known = [
            (number, place)
            for number, each in enumerate(labels)
            for place, label in enumerate(each)
            if chosen[number] and label >= 0
        ]
        pairs = list(zip(whose.tolist(), where.tolist(), strict=True))
        assert len(pairs) == min(most, len(known))
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) <= set(known)
        assert found.rows.labels.tolist() == [labels[number][place] for number, place in pairs]
        assert found.folds.tolist() == folds[whose].tolist()
        assert (np.diff(found.rows.groups[np.argsort(whose, kind="stable")]) >= 0).all()
