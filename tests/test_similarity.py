"""`similarity`: cosines of distances from a reference's mean, in its deviations."""

import numpy as np
import pytest
import torch
from helpers import random_sequence, small_model

import rd_torch
from rd_torch import Nesting, similarity


def draw(rows, width=12, seed=0):
    """Vectors with a large mean and features of very different deviations."""
    rng = np.random.default_rng(seed)
    return 7.0 + rng.normal(size=(rows, width)) * np.geomspace(3, 0.1, width)


def by_formula(vectors, others, reference, scale="feature"):
    k = vectors.shape[1]
    mean, deviations = reference.mean(0)[:k], reference.std(0, ddof=1)[:k]
    found = np.empty((len(vectors), len(others)))
    for i, a in enumerate(vectors):
        for j, b in enumerate(others):
            a_, b_ = ((each - mean) / (deviations if scale == "feature" else 1) for each in (a, b))
            found[i, j] = a_ @ b_ / np.sqrt((a_ @ a_) * (b_ @ b_))
    return found


@pytest.mark.parametrize("scale", ["feature", "none"])
@pytest.mark.parametrize("width", [1, 5, 12])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_it_is_the_cosine_of_distances_in_deviations(scale, width, kind):
    vectors, others, reference = draw(4, seed=1)[:, :width], draw(6, seed=2)[:, :width], draw(50)
    found = similarity(kind(vectors), kind(others), reference=kind(reference), scale=scale)
    assert type(found) is type(kind(vectors))
    assert np.abs(np.asarray(found) - by_formula(vectors, others, reference, scale)).max() < 1e-12
    alone = similarity(kind(vectors), reference=kind(reference), scale=scale)
    assert np.abs(np.asarray(alone) - by_formula(vectors, vectors, reference, scale)).max() < 1e-12


def test_a_similarity_does_not_depend_on_what_else_is_asked_for():
    vectors, reference = draw(9, seed=1), draw(50)
    whole = similarity(vectors, reference=reference)
    for rows in ([0, 3], [5], [8, 2, 0]):
        part = similarity(vectors[rows], vectors, reference=reference)
        assert np.allclose(part, whole[rows], atol=1e-12)


def test_features_of_little_variance_count_as_much_as_others():
    reference = draw(2_000)
    rng = np.random.default_rng(3)
    kinds = rng.integers(2, size=200)
    vectors = draw(200, seed=4)
    vectors[:, 9:] += np.where(kinds == 0, 1, -1)[:, None] * 2 * reference.std(0)[9:]

    def right(scale):
        found = similarity(vectors, reference=reference, scale=scale) - 3 * np.eye(200)
        return (kinds[found.argmax(1)] == kinds).mean()

    assert right("feature") > 0.9 > right("none")


def test_vectors_at_the_mean_and_constant_features_give_no_nan():
    reference = draw(50)
    reference[:, 3] = 5.0
    vectors = np.vstack((reference.mean(0), draw(2, seed=1)))
    found = similarity(vectors, reference=reference)
    assert np.isfinite(found).all()
    vectors[1:, 3] += 1e6  # what never varied says nothing
    assert np.allclose(similarity(vectors[1:], reference=reference), found[1:, 1:])
    still = similarity(vectors, reference=np.ones((5, 12)))
    assert np.array_equal(still, np.zeros((3, 3)))
    exact = similarity(reference.mean(0)[None], vectors, reference=reference)
    assert np.abs(exact).max() <= 1
    assert similarity(vectors[:0], vectors, reference=reference).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_computed_in_float32(dtype):
    vectors, reference = torch.from_numpy(draw(5)).to(dtype), torch.from_numpy(draw(40, seed=1)).to(dtype)
    found = similarity(vectors, reference=reference)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    exact = by_formula(vectors.double().numpy(), vectors.double().numpy(), reference.double().numpy())
    assert np.abs(found.double().numpy() - exact).max() < 1e-5


def test_a_chain_knows_means_and_deviations_of_its_features(tmp_path):
    backbones = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K").backbones
    proteins = [random_sequence(60, seed=k) for k in range(6)]
    model = rd_torch.fit(backbones, proteins, scale="block")
    rows = np.concatenate(rd_torch.embed(model, proteins, pool="none"))
    model.save_pretrained(tmp_path)
    for chain in (model, rd_torch.RDModel.from_pretrained(tmp_path), Nesting.from_pretrained(tmp_path)):
        for width in (20, 32, 48):
            found = similarity(rows[:50, :width], reference=chain)
            assert np.abs(found - similarity(rows[:50, :width], reference=rows)).max() < 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vectors": np.ones(3)}, r"expected vectors \(n, k\) and others \(m, k\), got \(3,\) and \(3,\)"),
        ({"others": np.ones((2, 5))}, r"got \(4, 12\) and \(2, 5\)"),
        ({"reference": draw(1)}, r"expected at least two vectors \(rows, k\) as reference, got \(1, 12\)"),
        ({"reference": draw(9, 11)}, "expected a reference of at least 12 features, got 11"),
        ({"reference": np.full((3, 12), np.nan)}, "expected a finite reference, got NaN or infinity"),
        ({"scale": "block"}, "expected scale to be one of 'none', 'feature', got 'block'"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed, message):
    given = {"vectors": draw(4), "reference": draw(9)} | changed
    with pytest.raises(ValueError, match=message):
        similarity(**given)


def test_maps_alone_are_no_reference():
    with pytest.raises(ValueError, match="got a chain of maps alone, which knows no means"):
        similarity(torch.zeros(2, 64), reference=small_model())
