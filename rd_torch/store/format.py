"""`Format`: how embeddings lie in a store. Each format is one subclass, in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from rd_torch.pooling import pools_of
from rd_torch.store.facts import Facts
from rd_torch.store.store import Store
from rd_torch.store.windows import Window

Row: TypeAlias = tuple[int, Tensor]
"""The place of a record in its window, from 0, and its vector or `(residues, width)` embedding to save."""


class Format(ABC):
    """One way to lay out embeddings in files.

    Attributes:
        name: name of the format, and suffix of its stores without the dot.
        dtypes: types of number that it can hold.
        pools: ways to pool residues that it can hold, `"none"` among them if it holds a vector for each.
        variant_pools: ways to pool that only variants have and that it can hold.
        identifier: the part of a FASTA header that becomes the identifier unless the user chooses another,
            as for `rd_torch.Proteins`.
        in_parts: whether the store is the folder of the windows' files, so that there is nothing to put
            together when the last of them is written.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    pools: ClassVar[tuple[str, ...]]
    variant_pools: ClassVar[tuple[str, ...]] = ()
    identifier: ClassVar[str] = "word"
    in_parts: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def key(name: str) -> str:
        """Return what must differ between two names, so that both have room in one store."""

    @abstractmethod
    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Write a window to files of its own, each of which is whole or not there.

        Args:
            folder: where the files are written.
            window: the records.
            rows: their embeddings, in any order; a record without one is left out.
            facts: what is embedded with what.

        Returns:
            The files.
        """

    @abstractmethod
    def finish(self, folder: Path, records: Iterable[tuple[str, Path]], facts: Facts, checksum: str) -> Path:
        """Make the whole store of the windows that were written, under a name of its own.

        Args:
            folder: where the windows' files are.
            records: the name of each embedded record in FASTA order, with the first file of its window.
            facts: what was embedded with what, which is written into the store.
            checksum: checksum of all records, which is written into the store.

        Returns:
            The file or folder that is the store, which the caller moves to its place.
        """

    @staticmethod
    @abstractmethod
    def claims(path: Path) -> bool:
        """Whether this format opens a file or folder, where no format before it in the list does."""

    @abstractmethod
    def open(self, path: Path) -> Store:
        """Open a finished store, of another program too where the layout is theirs."""


def require_fitting(form: Format, facts: Facts) -> None:
    """Refuse a type of number or a way to pool that a format does not hold.

    Raises:
        ValueError: for such a one; it lists what the format holds.
    """
    ways = [way for way in pools_of(facts.pool) or ("none",) if way not in form.variant_pools]
    pools = [("pool", way, form.pools) for way in ways]
    for what, got, taken in [("save_dtype", facts.save_dtype, form.dtypes), *pools]:
        if got not in taken:
            raise ValueError(
                f"expected {what} to be one of {', '.join(map(repr, taken))} in .{form.name}, got {got!r}"
            )
