"""Groups of similar sequences, which splits must not part."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

IDENTITIES: Final = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Identities, estimated from shared words, from which on two sequences are similar; the first that serves."""

LEAST_SHARED: Final = 3
"""Number of words that similar sequences share at least, beyond three times what chance lets them share."""

KINDS: Final = 16
"""Number of equally frequent residues among which two are as often the same as in proteins."""

LONG: Final = 25
"""Median number of residues from which on words have five residues, and not three."""

MMSEQS: Final = ("-c", "0.5", "--cov-mode", "1", "--cluster-mode", "1", "-v", "1")
"""Options of MMseqs2: a group is everything that chains of hits connect."""

MMSEQS_IDENTITIES: Final = (0.3, 0.5, 0.7, 0.9)
"""Identities from which on two sequences are similar for MMseqs2; the first that serves."""


class Groups(NamedTuple):
    """Groups of similar sequences.

    Attributes:
        numbers: `(sequences,)` number of each sequence's group, from 0.
        how: how similarity was told, in words.
    """

    numbers: np.ndarray
    how: str

    @property
    def sizes(self) -> np.ndarray:
        """`(groups,)` number of sequences in each group."""
        return np.bincount(self.numbers)


def group_similar(sequences: Sequence[str], most: float = 1.0) -> Groups:
    """Group sequences, so that those in different groups are not similar.

    MMseqs2 does it where it is installed. Otherwise two sequences are similar where they share so many words
    of `k` residues that their identity is estimated at 50 % or more: the shared share of the shorter one's
    words, to the power of `1 / k`, where what chance lets them share does not count. Whatever a chain of
    similar sequences connects is one group. Homologs that share fewer words can lie in different groups,
    which MMseqs2 would join.

    Args:
        sequences: residues of each sequence; equal ones are always in one group.
        most: share of the sequences that one group may have. Where it has more, higher identities are tried;
            if the highest does not serve either, its groups are returned.

    Returns:
        The groups, and how they were made.

    Raises:
        RuntimeError: where MMseqs2 fails.
    """
    distinct, places = np.unique(np.asarray(sequences, dtype=object).astype(str), return_inverse=True)
    program = shutil.which("mmseqs")
    k = 5 if np.median([len(each) for each in sequences]) >= LONG else 3
    words = [] if program else [_words(each, k) for each in distinct]
    for identity in MMSEQS_IDENTITIES if program else IDENTITIES:
        if program:
            numbers, how = _by_mmseqs(program, list(distinct), identity), "MMseqs2 at"
        else:
            numbers, how = _connect(words, k, identity), f"shared words of {k} residues, at an estimated"
        groups = Groups(numbers[places], f"by {how} {identity:.0%} identity")
        if groups.sizes.max() <= most * len(sequences):
            break
    return groups


def _by_mmseqs(program: str, sequences: Sequence[str], identity: float) -> np.ndarray:
    """Return the number of each sequence's group, as MMseqs2 finds it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        fasta = "".join(f">{number}\n{each}\n" for number, each in enumerate(sequences))
        (place / "in.fasta").write_text(fasta)
        options = ["--min-seq-id", str(identity), *MMSEQS]
        command = [program, "easy-cluster", "in.fasta", "out", "scratch", *options]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"expected MMseqs2 to group the sequences, got: {done.stderr or done.stdout}")
        pairs = [line.split("\t") for line in (place / "out_cluster.tsv").read_text().splitlines()]
    first = {int(member): int(representative) for representative, member in pairs}
    return np.unique([first[number] for number in range(len(sequences))], return_inverse=True)[1]


def _words(sequence: str, k: int) -> np.ndarray:
    """Return the different words of `k` letters of a sequence, as numbers; a shorter one is one word."""
    letters = np.frombuffer(sequence.encode(), np.uint8).astype(np.int64) - ord("A")
    count = max(1, len(letters) - k + 1)
    words = np.zeros(count, np.int64)
    for place in range(min(k, len(letters))):
        words = words * 32 + letters[place : place + count] + 1
    return np.unique(words)


def _connect(words: Sequence[np.ndarray], k: int, identity: float) -> np.ndarray:
    """Return the number of each sequence's group: what chains of similar sequences connect.

    Sequences that are in a group are taken out of the lists of who has which word, so that a family is
    compared with itself once and not member by member.
    """
    numbers = np.full(len(words), -1)
    sizes = np.array([len(each) for each in words])
    lists = _Lists.of(words, np.arange(len(words)))
    left, listed = len(words), len(words)
    for seed in range(len(words)):
        if numbers[seed] >= 0:
            continue
        numbers[seed], waiting = seed, [seed]
        left -= 1
        while waiting:
            one = waiting.pop()
            shared = np.bincount(lists.holders(words[one]), minlength=len(words))
            smaller = np.minimum(sizes, sizes[one])
            by_chance = sizes * sizes[one] / float(KINDS) ** k
            least = np.minimum(LEAST_SHARED, smaller) + np.where(smaller > LEAST_SHARED, 3 * by_chance, 0)
            needed = np.maximum(least, identity**k * smaller)
            found = np.flatnonzero((shared >= needed) & (numbers < 0))
            numbers[found] = seed
            waiting.extend(found.tolist())
            left -= len(found)
            if left < listed // 2:
                remaining = np.flatnonzero(numbers < 0)
                lists, listed = _Lists.of(words, remaining), left
    return np.unique(numbers, return_inverse=True)[1]


class _Lists(NamedTuple):
    """For each word, the sequences that have it, word after word."""

    words: np.ndarray
    starts: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, words: Sequence[np.ndarray], chosen: np.ndarray) -> _Lists:
        """List the words of the chosen sequences."""
        if not len(chosen):
            return cls(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64))
        flat = np.concatenate([words[each] for each in chosen])
        owners = np.repeat(chosen, [len(words[each]) for each in chosen])
        order = np.argsort(flat, kind="stable")
        distinct, starts = np.unique(flat[order], return_index=True)
        return cls(distinct, np.append(starts, len(flat)), owners[order])

    def holders(self, words: np.ndarray) -> np.ndarray:
        """Return who has these words, each as often as there are words that it has."""
        if not len(self.words):
            return np.zeros(0, np.int64)
        places = np.searchsorted(self.words, words)
        places = places[
            (places < len(self.words)) & (self.words[np.minimum(places, len(self.words) - 1)] == words)
        ]
        parts = [self.owners[self.starts[each] : self.starts[each + 1]] for each in places]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
