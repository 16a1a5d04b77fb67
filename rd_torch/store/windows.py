"""Windows: a stretch of records in order that is computed, written and found again as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Self, TypeAlias, TypeVar

from rd_torch.config import SPECIAL_TOKENS
from rd_torch.sequences import WINDOW_BATCHES, Entry
from rd_torch.store.naming import Names

Content = TypeVar("Content")

Length: TypeAlias = int | None
"""Residues of a record; None where nobody counted them."""

Place: TypeAlias = tuple[str, int]
"""The file and the line where a record stands; no file and its number where it came from elsewhere."""


def count_residues(lengths: Iterable[Length]) -> int:
    """Residues of records of these lengths, as far as they are counted."""
    return sum(filter(None, lengths))


class Record(NamedTuple, Generic[Content]):
    """A record on its way into a store.

    Attributes:
        identifier: its name, which another may have too.
        content: what its embedding is computed from.
        length: its residues.
        size: what it counts when windows are cut.
        digested: what the checksum is taken of.
        place: where it stands.
        fault: why it cannot be embedded; empty where it can.
    """

    identifier: str
    content: Content
    length: Length
    size: int
    digested: Iterable[bytes | memoryview]
    place: Place = ("", 0)
    fault: str = ""


@dataclass(frozen=True)
class Window(Generic[Content]):
    """A stretch of records.

    Attributes:
        number: from 0.
        names: their names in the store, in order.
        contents: what their embeddings are computed from: letters, residues only, or raw embeddings.
        lengths: their residues.
        checksum: of the identifiers and contents of all records up to the end of this window.
        kind: what the contents are called.
        places: where the records stand, as far as that is known.
        faults: why records cannot be embedded that came in so, by their number in the window.
    """

    number: int
    names: list[str]
    contents: list[Content]
    lengths: list[Length]
    checksum: str
    kind: str = "sequences"
    places: list[Place] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def residues(self) -> int:
        """Residues of all its records, as far as they are counted."""
        return count_residues(self.lengths)


def cut_windows(
    entries: Iterable[Entry], tokens_per_batch: int, names: Names | None = None
) -> Iterator[Window[str]]:
    """The records in windows of about 16 batches, as they come; the same records give the same windows.

    Args:
        entries: normalised records; those with a fault take a name and stay without an embedding.
        tokens_per_batch: tokens a batch holds at most.
        names: gives records that share an identifier names of their own; without, they have none, and the
            checksums are of the sequences alone.

    Raises:
        ValueError: for a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"expected tokens_per_batch of at least 1, got {tokens_per_batch}")
    if names is None:
        entries = (entry._replace(identifier="") for entry in entries)
    return gather(map(_record_of, entries), WINDOW_BATCHES * tokens_per_batch, names)


def _record_of(entry: Entry) -> Record[str]:
    """A record on its way; as many tokens as it has count."""
    name, letters, fault = entry.identifier, entry.sequence, entry.fault
    # Not the fault's words, which another version, or a line that was added above, may change.
    digested = f"{name}\n{letters}\n{'left out' if fault else ''}".encode(errors="surrogatepass")
    size = len(letters) + SPECIAL_TOKENS
    return Record(name, letters, len(letters), size, [digested], (entry.source, entry.line), fault)


def gather(
    records: Iterable[Record[Content]], size: int, names: Names | None, kind: str = "sequences"
) -> Iterator[Window[Content]]:
    """Records in windows that end with the first record that makes them `size` large or larger.

    Args:
        records: as they come.
        size: in the unit of the records' own.
        names: gives records that share an identifier names of their own; without, they keep it.
        kind: what the contents are called.
    """
    checksum = hashlib.blake2b(digest_size=16)
    number, full, taken = 0, 0, _Taken[Content].empty()
    for record in records:
        for part in record.digested:
            checksum.update(part)
        taken.names.append(names.unique(record.identifier) if names else record.identifier)
        taken.contents.append(record.content)
        taken.lengths.append(record.length)
        taken.places.append(record.place)
        if record.fault:
            taken.faults[len(taken.names) - 1] = record.fault
        full += record.size
        if full >= size:
            yield taken.window(number, checksum.hexdigest(), kind)
            number, full, taken = number + 1, 0, _Taken.empty()
    if taken.names:
        yield taken.window(number, checksum.hexdigest(), kind)


class _Taken(NamedTuple, Generic[Content]):
    """Records that wait for their window to be full."""

    names: list[str]
    contents: list[Content]
    lengths: list[Length]
    places: list[Place]
    faults: dict[int, str]

    @classmethod
    def empty(cls) -> Self:
        """None yet."""
        return cls([], [], [], [], {})

    def window(self, number: int, checksum: str, kind: str) -> Window[Content]:
        """The window of them."""
        return Window(
            number, self.names, self.contents, self.lengths, checksum, kind, self.places, self.faults
        )
