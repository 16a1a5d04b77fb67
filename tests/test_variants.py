"""Scores of variants against fair-esm's formulas, level by level, and in windows of long proteins."""

import numpy as np
import pytest
import torch
from helpers import layered_model, random_sequence, small_model

import rd_torch
from rd_torch import RDModel
from rd_torch.backbone import MissingHead
from rd_torch.levels import ALPHABET
from rd_torch.oracles import ORACLES
from rd_torch.variants import SCORINGS, Substitution, Variant, all_single, asking, read_variant
from rd_torch.variants.view import View

WILD = random_sequence(24, seed=3)
SINGLE = [each.name for each in all_single(WILD)][::9]
SEVERAL = [":".join(SINGLE[place::17]) for place in range(4)]
VARIANTS = [*SINGLE, *SEVERAL, "WT"]
LEVELS = ["28K", "90K", "207K", "1M"]
TOLERANCE = 2e-5
"""Nats; logits are up to about ten, and fair-esm computes them in float32."""


@pytest.fixture(scope="module")
def shipped():
    return RDModel.from_pretrained("esm2-rd-mini")


def log_probabilities(model, level, sequence, masked=()):
    """fair-esm's, of its own model with our tensors: `(residues, 33)`."""
    _, _, tokens = ALPHABET.get_batch_converter()([("", sequence)])
    for site in masked:
        tokens[0, site + 1] = ALPHABET.mask_idx
    backbone = model.backbones[level]
    with torch.no_grad():
        logits = ORACLES["esm2"].run(backbone, tokens)["logits"]
    return torch.log_softmax(logits, -1)[0, 1:-1]


def pseudo_likelihood(model, level, sequence):
    return sum(
        float(log_probabilities(model, level, sequence, [site])[site, ALPHABET.get_idx(letter)])
        for site, letter in enumerate(sequence)
    )


def expected_score(model, level, variant, scoring):
    """The formulas, a variant at a time and without batches."""
    if scoring == "pseudo-likelihood":
        return pseudo_likelihood(model, level, variant.mutate(WILD)) - pseudo_likelihood(model, level, WILD)
    total = 0.0
    for site, wild, mutant in variant.substitutions:
        masked = {"wild-type": (), "masked": (site,), "masked-jointly": variant.sites}[scoring]
        row = log_probabilities(model, level, WILD, masked)[site]
        total += float(row[ALPHABET.get_idx(mutant)] - row[ALPHABET.get_idx(wild)])
    return total


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("level", LEVELS)
def test_scores_are_fair_esms(shipped, level, scoring):
    variants = VARIANTS if scoring != "pseudo-likelihood" else [*SINGLE[:2], SEVERAL[0], "WT"]
    got = rd_torch.score_variants(shipped, WILD, variants, scoring=scoring, levels=[level])[level]
    read = [read_variant(each, WILD) for each in variants]
    expected = [expected_score(shipped, level, each, scoring) for each in read]
    assert np.abs(got - expected).max() < TOLERANCE
    assert got[-1] == 0
    assert np.std(got) > 0.1


def test_levels_side_by_side_are_those_alone(shipped):
    together = rd_torch.score_variants(shipped, WILD, VARIANTS, levels=LEVELS)
    assert list(together) == LEVELS
    for level in LEVELS:
        alone = rd_torch.score_variants(shipped, WILD, VARIANTS, levels=[level])[level]
        cut = rd_torch.score_variants(shipped.truncate(level), WILD, VARIANTS)[level]
        assert np.array_equal(together[level], alone)
        assert np.array_equal(cut, alone)


def test_no_other_backbone_runs(shipped, monkeypatch):
    for level in LEVELS[:-1]:
        monkeypatch.setattr(shipped.backbones[level], "forward", None)
    assert rd_torch.score_variants(shipped, WILD, SINGLE)["1M"].shape == (len(SINGLE),)


def test_masked_together_is_masked_alone_for_single_substitutions_and_not_for_several(shipped):
    alone = rd_torch.score_variants(shipped, WILD, VARIANTS, scoring="masked")["1M"]
    jointly = rd_torch.score_variants(shipped, WILD, VARIANTS, scoring="masked-jointly")["1M"]
    singles = slice(len(SINGLE))
    assert np.abs(alone - jointly)[singles].max() < TOLERANCE
    assert np.abs(alone - jointly)[len(SINGLE) : -1].min() > TOLERANCE


def test_a_sum_is_the_sum_of_its_parts(shipped):
    for scoring in ("wild-type", "masked"):
        parts = rd_torch.score_variants(shipped, WILD, SINGLE, scoring=scoring)["1M"]
        sums = rd_torch.score_variants(shipped, WILD, SEVERAL, scoring=scoring)["1M"]
        assert np.allclose(sums, [parts[place::17].sum() for place in range(4)], atol=1e-9)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_neither_order_nor_batches_nor_company_matter(shipped, scoring):
    some = VARIANTS[:6] + VARIANTS[-3:]
    whole = rd_torch.score_variants(shipped, WILD, some, scoring=scoring)["1M"]
    small = rd_torch.score_variants(shipped, WILD, some[::-1], scoring=scoring, tokens_per_batch=60)["1M"]
    assert np.abs(whole - small[::-1]).max() < TOLERANCE
    assert np.array_equal(rd_torch.score_variants(shipped, WILD, [])["1M"], np.zeros(0))


def test_each_site_is_asked_about_once(shipped, monkeypatch):
    asked = []
    run = asking.run_batches

    def counting(compute, sequences, *others, **options):
        asked.extend(sequences)
        return run(compute, sequences, *others, **options)

    monkeypatch.setattr(asking, "run_batches", counting)
    variants = [each.name for each in all_single(WILD[:5])] * 2 + ["WT"]
    rd_torch.score_variants(shipped, WILD[:5], variants)
    assert len(asked) == 5
    asked.clear()
    rd_torch.score_variants(shipped, WILD[:5], variants, scoring="wild-type")
    assert asked == [WILD[:5]]
    asked.clear()
    rd_torch.score_variants(shipped, WILD[:5], variants[:2], scoring="pseudo-likelihood")
    assert len(asked) == 5 * 3


def test_the_model_is_as_it_was(shipped):
    shipped.train()
    shipped.backbones["90K"].eval()
    before = {name: part.training for name, part in shipped.named_modules()}
    rd_torch.score_variants(shipped, WILD, SINGLE[:2], levels=LEVELS)
    assert {name: part.training for name, part in shipped.named_modules()} == before
    shipped.eval()


def test_half_precision_is_near(shipped):
    half = RDModel.from_pretrained("esm2-rd-mini", dtype=torch.bfloat16)
    exact = rd_torch.score_variants(shipped, WILD, SINGLE)["1M"]
    near = rd_torch.score_variants(half, WILD, SINGLE)["1M"]
    assert 0 < np.abs(near - exact).max() < 0.25
    double = RDModel.from_pretrained("esm2-rd-mini", dtype=torch.float64)
    assert np.abs(rd_torch.score_variants(double, WILD, SINGLE)["1M"] - exact).max() < TOLERANCE


def test_esmc_is_scored_by_its_own_head():
    from esmc import our_esmc

    model = RDModel({"a": our_esmc(2, 32, 2)}, []).eval()
    variant = read_variant(SINGLE[0], WILD)
    ((site, wild, mutant),) = variant.substitutions
    tokens = torch.tensor([model.alphabet.ids_of(WILD)])
    tokens[0, site + 1] = model.mask_idx
    with torch.no_grad():
        row = model(tokens).logits[0, site + 1]
    expected = row[model.alphabet.get_idx(mutant)] - row[model.alphabet.get_idx(wild)]
    assert abs(rd_torch.score_variants(model, WILD, [variant])["a"][0] - float(expected)) < TOLERANCE


# Long proteins


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_window_as_long_as_the_protein_changes_nothing(shipped, scoring):
    some = VARIANTS[::8]
    whole = rd_torch.score_variants(shipped, WILD, some, scoring=scoring)["1M"]
    seen = rd_torch.score_variants(shipped, WILD, some, scoring=scoring, window=len(WILD))["1M"]
    assert np.array_equal(whole, seen)


def test_within_a_window_scores_are_those_of_the_piece_around_the_site(shipped):
    for site in (0, 3, 12, 23):
        mutant = "A" if WILD[site] != "A" else "C"
        start = min(max(site - 5, 0), len(WILD) - 11)
        piece = WILD[start : start + 11]
        variant = Variant("", (Substitution(site, WILD[site], mutant),))
        moved = Variant("", (Substitution(site - start, WILD[site], mutant),))
        got = rd_torch.score_variants(shipped, WILD, [variant], window=11)["1M"]
        expected = rd_torch.score_variants(shipped, piece, [moved])["1M"]
        assert abs(got - expected) < TOLERANCE


@pytest.mark.parametrize("residues", [1, 5, 30, 31, 100])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize("step", [1, 3])
def test_a_site_is_in_the_middle_of_its_window_as_far_as_the_protein_allows(residues, length, step):
    view = View(length)
    for site in range(residues):
        start = view.start((site,), residues, max(1, min(step, length // 4)))
        seen = view.cut("A" * residues, start)
        assert 0 <= start <= site < start + len(seen) <= residues
        assert len(seen) == min(length, residues)
        if step == 1 and length <= residues:
            before, after = site - start, start + length - 1 - site
            assert abs(before - after) <= 1 or start in (0, residues - length)


def test_sites_that_a_window_cannot_show_together_are_refused(shipped):
    variant = f"{WILD[0]}1{'A' if WILD[0] != 'A' else 'C'}:{WILD[20]}21{'A' if WILD[20] != 'A' else 'C'}"
    with pytest.raises(ValueError, match="expected sites within a window of 10 residues, .* lie 20 apart"):
        rd_torch.score_variants(shipped, WILD, [variant], scoring="masked-jointly", window=10)
    assert np.isfinite(rd_torch.score_variants(shipped, WILD, [variant], window=10)["1M"]).all()


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((WILD, SINGLE), {"scoring": "best"}, "expected scoring to be one of 'wild-type', 'masked'"),
        ((WILD, SINGLE), {"levels": ["650M"]}, "expected level to be one of '28K'"),
        ((WILD, SINGLE), {"window": 0}, "expected a window of at least 1 residue, got 0"),
        ((WILD, ["A1"]), {}, "expected substitutions such as A24G"),
        (("MK1", SINGLE), {}, "expected letters"),
        (("MKJ", SINGLE), {}, "got 'J' at position 3"),
        (("MKV", [Variant("x", (Substitution(0, "K", "A"),))]), {}, "expected M at position 1"),
        (("MKV", [Variant("x", (Substitution(9, "K", "A"),))]), {}, "expected a position from 1 to 3"),
    ],
)
def test_wrong_arguments_are_refused(shipped, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rd_torch.score_variants(shipped, *arguments, **options)


def test_one_string_is_not_several_variants(shipped):
    with pytest.raises(TypeError, match=r"put it in a list, \['K2R'\]"):
        rd_torch.score_variants(shipped, "MKV", "K2R")


def test_a_missing_variant_is_named_by_its_number(shipped):
    with pytest.raises(TypeError, match="expected variants as text, got float as item number 2"):
        rd_torch.score_variants(shipped, "MKV", ["K2R", float("nan")])


def test_one_string_is_not_several_levels(shipped):
    with pytest.raises(TypeError, match=r"put it in a list, \['1M'\]"):
        rd_torch.score_variants(shipped, "MKV", ["K2R"], levels="1M")


def test_numbers_that_are_none_are_refused():
    model = small_model()
    with torch.no_grad():
        model.backbones["c"].lm_head.bias[5] = torch.nan
    with pytest.raises(ValueError, match="expected finite probabilities of level c, got NaN or infinity"):
        rd_torch.score_variants(model, "MKV", ["K2R"])


def test_unknown_letters_count_for_nothing_in_a_pseudo_likelihood(shipped):
    plain = rd_torch.score_variants(shipped, "MKVX", ["K2R"], scoring="pseudo-likelihood")["1M"][0]
    rows = {
        text: [
            log_probabilities(shipped, "1M", text, [site])[site, ALPHABET.get_idx(text[site])]
            for site in range(3)
        ]
        for text in ("MRVX", "MKVX")
    }
    assert abs(plain - float(sum(rows["MRVX"]) - sum(rows["MKVX"]))) < TOLERANCE


def test_levels_without_a_head_are_refused():
    with pytest.raises(ValueError, match="expected a level that is the last layer of its backbone.*got b@2"):
        rd_torch.score_variants(layered_model(), "MKV", ["K2R"], levels=["b@2"])
    assert set(rd_torch.score_variants(layered_model(), "MKV", ["K2R"], levels=["a", "b"])) == {"a", "b"}
    model = small_model()
    model.backbones["c"].lm_head = MissingHead()
    with pytest.raises(ValueError, match="expected a backbone with a language-model head at level c"):
        rd_torch.score_variants(model, "MKV", ["K2R"])
