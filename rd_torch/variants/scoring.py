"""Score variants without labels: how much likelier a language model finds the new letters than the old ones.

The three ways are those of Meier et al. (NeurIPS 2021, doi:10.1101/2021.07.09.450648). Every score is a
difference from the wild type, whose own is 0; higher means likelier. With `p(a | s)` for the probability of
letter `a` at a site of sequence `s`:

    wild-type           sum over the variant's sites of log p(mutant | wild type) - log p(wild | wild type)
    masked              the same, where in each term the site itself is masked
    masked-jointly      the same, where in each term all of the variant's sites are masked
    pseudo-likelihood   sum over all sites of log p(letter | variant with the site masked), less the same sum
                        for the wild type
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias, get_args

import numpy as np

from rd_torch.choices import Scoring, check_choice
from rd_torch.model import RDModel
from rd_torch.variants.asking import LanguageModel
from rd_torch.variants.variant import KNOWN, Substitution, Variant, read_variants, read_wild_type
from rd_torch.variants.view import STEPS_OF_A_WINDOW, Sites, View, view_of

Score: TypeAlias = Callable[[Variant], float]
"""Returns the score of a variant that the model was asked about."""

SCORINGS: Final[tuple[Scoring, ...]] = get_args(Scoring)


def score_variants(  # noqa: PLR0913
    model: RDModel,
    wild_type: str,
    variants: Iterable[str | Variant],
    *,
    scoring: Scoring = "masked",
    levels: Sequence[str] | None = None,
    first: int = 1,
    window: int | None = None,
    tokens_per_batch: int | None = None,
) -> dict[str, np.ndarray]:
    """Score variants of a protein by the language models of a chain, without labels.

    A score says how much likelier the model finds the variant than the wild type, in nats: 0 for the wild
    type, and below 0 for what the model would not expect. Each level is asked alone, and runs no other
    level's backbone.

    Args:
        model: the chain.
        wild_type: sequence of the wild type.
        variants: variants, in a notation that `rd_torch.variants.read_notation` describes, or as
            `rd_torch.variants.Variant`s.
        scoring: `"wild-type"` looks at the wild type as it is, in one pass; `"masked"` masks each mutated
            site by itself, and adds up the scores of several; `"masked-jointly"` masks all sites of a variant
            together; `"pseudo-likelihood"` masks every site of each variant, one by one.
        levels: names of the levels; by default the last one alone.
        first: the number that the variants have for the first residue of the wild type.
        window: number of residues that the model sees at once, around what it is asked about; by default
            it sees the whole sequence, however long.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes.

    Returns:
        The scores of each level, `(variants,)` float64 numbers in the order of the variants.

    Raises:
        TypeError: for one string in place of several variants or levels.
        ValueError: for a variant that cannot be read or does not fit the wild type, a level that is not there
            or has no language-model head, a scoring that does not exist, and sites that a window cannot show
            together.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> scores = rd_torch.score_variants(model, "MQIFVKTLTGKTITLEVEPS", ["K6R", "K6R:T7W", "p.Lys6="])
        >>> scores["1M"].shape, float(scores["1M"][2])
        ((3,), 0.0)
    """
    if isinstance(levels, str):
        raise TypeError(f"expected several levels, got one string: put it in a list, [{levels!r}]")
    residues, view = read_wild_type(wild_type), view_of(window)
    read = read_variants(variants, residues, first)
    needs = needs_of(read, scoring)
    found = {}
    for level in levels or [model.config.levels[-1].name]:
        score = ask_for_scores(
            LanguageModel(model, level, None, tokens_per_batch), residues, needs, scoring, view
        )
        found[level] = np.array([score(variant) for variant in read])
    return found


class Needs(NamedTuple):
    """What a model has to be asked about, for some variants.

    Attributes:
        sites: sites that are asked about together, each combination once; empty for pseudo-likelihoods.
        sequences: substitutions of each different variant, for pseudo-likelihoods; else empty.
    """

    sites: Sequence[Sites] = ()
    sequences: Sequence[tuple[Substitution, ...]] = ()


def needs_of(variants: Iterable[Variant], scoring: Scoring) -> Needs:
    """Gather what scores need, in one pass over the variants.

    Memory grows with the number of different sites, or of their combinations where they are masked together,
    or, for pseudo-likelihoods, of different variants.

    Raises:
        ValueError: for a scoring that does not exist.
    """
    check_choice("scoring", scoring, SCORINGS)
    if scoring == "pseudo-likelihood":
        return Needs(sequences=list(dict.fromkeys([(), *(each.substitutions for each in variants)])))
    return Needs(sites=sorted({sites for each in variants for sites in groups_of(each, scoring)}))


def groups_of(variant: Variant, scoring: Scoring) -> list[Sites]:
    """Return the sites of a variant that are asked about together."""
    if scoring == "masked-jointly":
        return [variant.sites] if variant.sites else []
    return [(site,) for site in variant.sites]


def ask_for_scores(
    language: LanguageModel, wild_type: str, needs: Needs, scoring: Scoring, view: View
) -> Score:
    """Ask a language model all that some variants' scores need.

    Args:
        language: the language model.
        wild_type: residues of the wild type.
        needs: what it is asked about.
        scoring: how variants are scored.
        view: the part of a long sequence that the model sees.

    Returns:
        The function that returns the score of each of these variants.

    Raises:
        ValueError: for sites that a window cannot show together.
    """
    if scoring == "pseudo-likelihood":
        return _pseudo_likelihoods(language, wild_type, needs.sequences, view)
    ask = _ask_unmasked if scoring == "wild-type" else _ask_masked
    rows = ask(language, wild_type, needs.sites, view)

    def score(variant: Variant) -> float:
        """Return the sum of the log odds at its sites."""
        found = (row for sites in groups_of(variant, scoring) for row in rows[sites])
        total = 0.0
        for row, (_, wild, mutant) in zip(found, variant.substitutions, strict=True):
            new, old = language.letters(mutant + wild)
            total += float(row[new] - row[old])
        return total

    return score


def count_questions(wild_type: str, needs: Needs, scoring: Scoring, view: View) -> int:
    """Return how many sequences a model has to read, for one level."""
    if scoring == "wild-type":
        return len(_windows(wild_type, needs.sites, view))
    return len(needs.sites) + len(wild_type) * len(needs.sequences)


def _ask_masked(
    language: LanguageModel, wild_type: str, asked: Sequence[Sites], view: View
) -> Mapping[Sites, np.ndarray]:
    """Return the log probabilities at sites that are masked together, by these sites."""
    questions = (view.question(wild_type, sites) for sites in asked)
    return {asked[number]: answer for number, answer in language.ask(questions)}


def _ask_unmasked(
    language: LanguageModel, wild_type: str, asked: Sequence[Sites], view: View
) -> Mapping[Sites, np.ndarray]:
    """Return the log probabilities at each site of the wild type as it is."""
    windows = list(_windows(wild_type, asked, view).items())
    questions = (view.cut(wild_type, start) for start, _ in windows)
    return {
        sites: answer[[site - windows[number][0] for site in sites]]
        for number, answer in language.ask(questions)
        for sites in windows[number][1]
    }


def _windows(wild_type: str, asked: Sequence[Sites], view: View) -> dict[int, list[Sites]]:
    """Return the sites that are looked at in each window, by where the window begins."""
    step = 1 if view.length is None else max(1, view.length // STEPS_OF_A_WINDOW)
    found: dict[int, list[Sites]] = {}
    for sites in asked:
        found.setdefault(view.start(sites, len(wild_type), step), []).append(sites)
    return found


def _pseudo_likelihoods(
    language: LanguageModel, wild_type: str, sequences: Sequence[tuple[Substitution, ...]], view: View
) -> Score:
    """Return what scores variants by the pseudo-likelihood of the whole sequence."""
    residues = len(wild_type)

    def questions() -> Iterator[str]:
        """Yield every sequence once with each of its sites masked."""
        for substitutions in sequences:
            mutated = Variant("", substitutions).mutate(wild_type)
            yield from (view.question(mutated, (site,)) for site in range(residues))

    sums = np.zeros(len(sequences))
    for number, answer in language.ask(questions()):
        place, site = divmod(number, residues)
        letter = next((each.mutant for each in sequences[place] if each.site == site), wild_type[site])
        if letter in KNOWN:  # how likely an X is says nothing
            sums[place] += answer[0, language.letters(letter)[0]]
    own = sums[sequences.index(())]
    by_variant = dict(zip(sequences, (sums - own).tolist(), strict=True))
    return lambda variant: by_variant[variant.substitutions]
