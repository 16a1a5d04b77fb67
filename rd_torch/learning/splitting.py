"""Which sequences teach, in which folds, and which judge: similar ones stay together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from rd_torch.labelled import FOLDS
from rd_torch.learning.selecting import LEAST_FOLDS
from rd_torch.learning.similar import Groups, group_similar

TEACHING: Final = frozenset(("train", "training", "valid", "validation", "val", "dev"))
JUDGING: Final = frozenset(("test", "testing", "holdout", "held-out"))
"""How the cells of a split column call sets, in lower case; anything else are names of folds."""

MOST_FOLDS: Final = 20
"""Number of folds beyond which a split column is taken for something else."""

LARGEST_GROUP: Final = 0.5
"""Share of the sequences beyond which one group is not kept whole, because it leaves too little to teach."""


@dataclass(frozen=True)
class Split:
    """Which sequences teach and which judge.

    Attributes:
        folds: `(sequences,)` number of each sequence's fold, from 0; -1 for those that judge and never teach.
        groups: `(sequences,)` number of each sequence's group of similar ones, over which scores vary.
        how: how the folds were made, in words.
    """

    folds: np.ndarray
    groups: np.ndarray
    how: str


def split_sequences(
    sequences: Sequence[str], cells: Sequence[str] | None = None, classes: np.ndarray | None = None
) -> Split:
    """Split sequences into folds, and into those that teach and those that judge.

    Args:
        sequences: residues of each sequence.
        cells: what the split column says of each; None to put similar ones into one fold.
        classes: `(sequences,)` class of each, which folds should have in equal shares; None for no classes.

    Returns:
        The split.

    Raises:
        ValueError: for a split column that names neither sets nor folds, for a sequence that stands in
            several of them, and for too few sequences to split.
    """
    if cells is None:
        return _own_folds(sequences, np.arange(len(sequences)), classes)
    names = [cell.strip().lower() for cell in cells]
    if "" in names:
        raise ValueError(
            f"expected a set or a fold for each sequence, got none for number {names.index('') + 1:,}"
        )
    _require_apart(sequences, names)
    if set(names) <= TEACHING | JUDGING:
        teaching = np.flatnonzero([name in TEACHING for name in names])
        if not 0 < len(teaching) < len(names):
            raise ValueError(f"expected sequences that teach and a test set, got {_counted(names)} alone")
        split, groups = _own_folds(sequences, teaching, classes), group_similar(sequences)
        judging = split.folds < 0
        leaking = judging & np.isin(groups.numbers, groups.numbers[~judging])
        _warn_of_similar(groups, leaking, " of the test set", "that teaches")
        return Split(split.folds, split.groups, f"{split.how}; the test set is that of the split column")
    distinct = sorted(set(names))
    if not LEAST_FOLDS <= len(distinct) <= MOST_FOLDS or set(names) & JUDGING:
        raise ValueError(
            f"expected train and test, or {LEAST_FOLDS} to {MOST_FOLDS} names of folds, in the split column, "
            f"got {_counted(names)}"
        )
    folds, groups = np.searchsorted(distinct, names), group_similar(sequences)
    pairs = np.unique(np.stack([groups.numbers, folds]), axis=1)
    _warn_of_similar(groups, np.bincount(pairs[0])[groups.numbers] > 1, "", "in another fold")
    return Split(folds, _over(groups), "the folds are those of the split column")


def _own_folds(sequences: Sequence[str], teaching: np.ndarray, classes: np.ndarray | None) -> Split:
    """Put groups of similar sequences into folds, or equal sequences where nearly all are similar."""
    groups = group_similar(sequences, LARGEST_GROUP)
    numbers, how = groups.numbers, f"similar sequences, grouped {groups.how}, lie in one fold"
    sizes = np.bincount(numbers[teaching])
    if (sizes > 0).sum() < FOLDS or sizes.max() > LARGEST_GROUP * len(teaching):
        warnings.warn(
            f"{sizes.max():,} of {len(teaching):,} sequences are similar to each other, as variants of one "
            "protein are: folds are drawn at random, so that scores hold for further variants of the same "
            "proteins, not for other proteins",
            stacklevel=4,
        )
        numbers = np.unique(np.asarray(sequences, dtype=object).astype(str), return_inverse=True)[1]
        how = "folds are drawn at random, with equal sequences in one fold"
    if len(set(numbers[teaching])) < 2 * FOLDS:
        raise ValueError(
            f"expected {2 * FOLDS} groups of sequences or more, got {len(set(numbers[teaching]))} of "
            f"{len(teaching):,} sequences that teach"
        )
    folds = np.full(len(sequences), -1)
    folds[teaching] = _deal(numbers[teaching], None if classes is None else classes[teaching])
    return Split(folds, np.unique(numbers, return_inverse=True)[1], f"{FOLDS} folds; {how}")


def _deal(groups: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """Return a fold for each row: whole groups, the largest first, each into the fold that has least of it.

    Groups of one size come in an order that is drawn. Where there are classes, a fold is chosen that lacks
    the group's classes most.
    """
    distinct, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kinds = np.zeros(len(groups), int) if classes is None else classes
    content = np.zeros((len(distinct), int(kinds.max()) + 1))
    np.add.at(content, (places, kinds), 1)
    totals = content.sum(0)
    order = np.random.default_rng(0).permutation(len(distinct))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, chosen = np.zeros((FOLDS, content.shape[1])), np.zeros(len(distinct), int)
    for group in order:
        own = content[group] / np.maximum(totals, 1)
        load = (filled / np.maximum(totals, 1)) @ (own > 0) + 1e-6 * filled.sum(1)
        chosen[group] = fold = int(load.argmin())
        filled[fold] += content[group]
    return chosen[places]


def _over(groups: Groups) -> np.ndarray:
    """Return the groups over which scores vary: of similar sequences, or each alone where these are few."""
    few = (groups.sizes > 0).sum() < 2 * FOLDS or groups.sizes.max() > LARGEST_GROUP * len(groups.numbers)
    return np.arange(len(groups.numbers)) if few else groups.numbers


def _require_apart(sequences: Sequence[str], names: Sequence[str]) -> None:
    """Raise a ValueError for a sequence that stands in several sets or folds."""
    of = dict[str, str]()
    twice = [
        (place, of[each])
        for place, (each, name) in enumerate(zip(sequences, names, strict=True))
        if of.setdefault(each, name) != name and {of[each], name} - TEACHING
    ]
    if twice:
        place, other = twice[0]
        raise ValueError(
            f"expected sequences that stand in one set or fold alone, got {len(twice):,} that stand in "
            f"several, the first in {other} and {names[place]} ({sequences[place][:20]}): keep one of each"
        )


def _warn_of_similar(groups: Groups, leaking: np.ndarray, which: str, other: str) -> None:
    """Warn where sequences that are predicted are similar to others that teach."""
    if leaking.any():
        warnings.warn(
            f"{leaking.sum():,} sequences{which} are similar to one {other} ({groups.how}): scores hold for "
            "such proteins, and say little of others",
            stacklevel=4,
        )


def _counted(names: Sequence[str]) -> str:
    """Return the most frequent names, with their numbers."""
    return ", ".join(f"{count:,} of {name!r}" for name, count in Counter(names).most_common(5))
