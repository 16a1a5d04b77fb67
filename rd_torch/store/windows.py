"""Windows: records that stand one after the other, and are computed, written and found again together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Self, TypeAlias, TypeVar

from rd_torch.levels import SPECIAL_TOKENS
from rd_torch.sequences import WINDOW_BATCHES, Entry
from rd_torch.store.naming import Names

Content = TypeVar("Content")

Length: TypeAlias = int | None
"""Number of residues of a record; None where nobody counted them."""

Origin: TypeAlias = tuple[str, int]
"""The file and the line that a record comes from; no file and its number where it was given in Python."""


def count_residues(lengths: Iterable[Length]) -> int:
    """Return the number of residues of records that have these lengths, as far as they are counted."""
    return sum(filter(None, lengths))


class Record(NamedTuple, Generic[Content]):
    """A record on its way into a store.

    Attributes:
        identifier: its identifier, which another record may have too.
        content: what its embedding is computed from.
        length: number of its residues.
        size: how much it adds to its window, in the unit by which windows are cut.
        digested: the parts of it that the checksum is computed from.
        origin: the file and line that it comes from.
        fault: why it cannot be embedded; empty where it can.
    """

    identifier: str
    content: Content
    length: Length
    size: int
    digested: Iterable[bytes | memoryview]
    origin: Origin = ("", 0)
    fault: str = ""


@dataclass(frozen=True)
class Window(Generic[Content]):
    """Records that stand one after the other.

    Attributes:
        number: number of the window, from 0.
        names: names of the records in the store, in order.
        contents: what the embeddings are computed from: letters of residues, or raw embeddings.
        lengths: number of residues of each record.
        checksum: checksum of the identifiers and contents of all records up to the end of this window.
        kind: what the contents are called in errors.
        origins: the file and line that each record comes from; empty where nobody knows.
        faults: why a record cannot be embedded, by its place in the window, of those that came with a fault.
    """

    number: int
    names: list[str]
    contents: list[Content]
    lengths: list[Length]
    checksum: str
    kind: str = "sequences"
    origins: list[Origin] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def residues(self) -> int:
        """Number of residues of all its records, as far as they are counted."""
        return count_residues(self.lengths)


def cut_windows(
    entries: Iterable[Entry], tokens_per_batch: int, names: Names | None = None
) -> Iterator[Window[str]]:
    """Cut records of proteins into windows of about 16 batches; the same records give the same windows.

    Args:
        entries: normalised records, which are read as they are needed. One with a fault takes a name, and has
            no embedding.
        tokens_per_batch: number of tokens that a batch holds at most.
        names: gives records that share an identifier names of their own. Without it records have no names,
            and checksums are of the sequences alone.

    Returns:
        The windows, each of which is made when it is asked for.

    Raises:
        ValueError: for fewer than one token in a batch.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"expected tokens_per_batch of at least 1, got {tokens_per_batch}")
    if names is None:
        entries = (entry._replace(identifier="") for entry in entries)
    return gather(map(_record_of, entries), WINDOW_BATCHES * tokens_per_batch, names)


def _record_of(entry: Entry) -> Record[str]:
    """Return a record whose size is the number of its tokens."""
    name, letters, fault = entry.identifier, entry.sequence, entry.fault
    # The words of a fault are left out: another version may say it otherwise, and a line that somebody adds
    # at the top of the file changes the number in it.
    digested = f"{name}\n{letters}\n{'left out' if fault else ''}".encode(errors="surrogatepass")
    size = len(letters) + SPECIAL_TOKENS
    return Record(name, letters, len(letters), size, [digested], (entry.source, entry.line), fault)


def gather(
    records: Iterable[Record[Content]], size: int, names: Names | None, kind: str = "sequences"
) -> Iterator[Window[Content]]:
    """Gather records in windows, each of which ends with the record that makes it `size` large or larger.

    Args:
        records: the records, which are read as they are needed.
        size: how large a window is, in the unit of the records' own sizes.
        names: gives records that share an identifier names of their own; without it they keep the identifier.
        kind: what the contents are called in errors.

    Yields:
        The windows, one at a time.
    """
    checksum = hashlib.blake2b(digest_size=16)
    number, full, waiting = 0, 0, _Waiting[Content].empty()
    for record in records:
        for part in record.digested:
            checksum.update(part)
        waiting.names.append(names.take(record.identifier) if names else record.identifier)
        waiting.contents.append(record.content)
        waiting.lengths.append(record.length)
        waiting.origins.append(record.origin)
        if record.fault:
            waiting.faults[len(waiting.names) - 1] = record.fault
        full += record.size
        if full >= size:
            yield waiting.window(number, checksum.hexdigest(), kind)
            number, full, waiting = number + 1, 0, _Waiting.empty()
    if waiting.names:
        yield waiting.window(number, checksum.hexdigest(), kind)


class _Waiting(NamedTuple, Generic[Content]):
    """Records that wait for their window to be full."""

    names: list[str]
    contents: list[Content]
    lengths: list[Length]
    origins: list[Origin]
    faults: dict[int, str]

    @classmethod
    def empty(cls) -> Self:
        """No records yet."""
        return cls([], [], [], [], {})

    def window(self, number: int, checksum: str, kind: str) -> Window[Content]:
        """Return the window that they are."""
        return Window(
            number, self.names, self.contents, self.lengths, checksum, kind, self.origins, self.faults
        )
