"""Windows: a stretch of records in FASTA order that is embedded, written and found again as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rd_torch.sequences import SPECIAL_TOKENS, WINDOW_BATCHES, Protein
from rd_torch.store.naming import Names


@dataclass(frozen=True)
class Window:
    """A stretch of records.

    Attributes:
        number: from 0.
        names: their names in the store, in FASTA order.
        sequences: letters, residues only.
        checksum: of the identifiers and sequences of all records up to the end of this window.
    """

    number: int
    names: list[str]
    sequences: list[str]
    checksum: str

    @property
    def residues(self) -> int:
        """Residues of all its records."""
        return sum(map(len, self.sequences))


def cut_windows(proteins: Iterable[Protein], tokens_per_batch: int, names: Names) -> Iterator[Window]:
    """The records in windows of about 16 batches, as they come; the same records give the same windows.

    Args:
        proteins: normalised records.
        tokens_per_batch: tokens a batch holds at most.
        names: gives records that share an identifier names of their own.

    Raises:
        ValueError: for a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"expected tokens_per_batch of at least 1, got {tokens_per_batch}")
    checksum = hashlib.blake2b(digest_size=16)
    number, tokens = 0, 0
    taken: list[str] = []
    sequences: list[str] = []
    for protein in proteins:
        checksum.update(f"{protein.identifier}\n{protein.sequence}\n".encode())
        taken.append(names.unique(protein.identifier))
        sequences.append(protein.sequence)
        tokens += len(protein.sequence) + SPECIAL_TOKENS
        if tokens >= WINDOW_BATCHES * tokens_per_batch:
            yield Window(number, taken, sequences, checksum.hexdigest())
            number, tokens, taken, sequences = number + 1, 0, [], []
    if taken:
        yield Window(number, taken, sequences, checksum.hexdigest())
