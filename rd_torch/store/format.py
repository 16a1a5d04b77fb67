"""What every format of a store can do: write a window, be finished, be opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from rd_torch.config import FormatName
from rd_torch.pooling import pools_of
from rd_torch.store.facts import Facts
from rd_torch.store.store import Store
from rd_torch.store.windows import Window

Row: TypeAlias = tuple[int, Tensor]
"""The place of a record in its window, and its vector or `(residues, width)` embedding as it is saved."""


class Format(ABC):
    """One way to lay a store out.

    Attributes:
        name: what `--format` calls it, and the suffix without its dot.
        dtypes: what it can hold.
        pools: how residues can be pooled in it.
        identifier: what is taken of a FASTA header unless somebody chooses, as `rd_torch.Proteins` says.
    """

    name: ClassVar[FormatName]
    dtypes: ClassVar[tuple[str, ...]]
    pools: ClassVar[tuple[str, ...]]
    identifier: ClassVar[str] = "word"

    @staticmethod
    @abstractmethod
    def key(name: str) -> str:
        """What must differ between the names of two records."""

    @abstractmethod
    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Writes a window to files of its own in `folder`, each whole or not at all; returns them.

        Records that do not come are left out; rows come in any order.
        """

    @abstractmethod
    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """Makes the finished store of the written windows under another name, then renames it.

        Args:
            folder: where the windows are.
            names: each record in FASTA order, with its window's first file.
            facts: written into the store.
            checksum: of all records, written into the store.
            path: the store; nothing is there yet.
        """

    @abstractmethod
    def open(self, path: Path) -> Store:
        """Opens a finished store."""


def require_fitting(form: Format, facts: Facts) -> None:
    """Raises a ValueError for a dtype or pooling that the format does not take."""
    pools = [("pool", way, form.pools) for way in pools_of(facts.pool) or ("none",)]
    for what, got, taken in [("save_dtype", facts.save_dtype, form.dtypes), *pools]:
        if got not in taken:
            raise ValueError(
                f"expected {what} to be one of {', '.join(map(repr, taken))} in .{form.name}, got {got!r}"
            )
