"""`IndexConfig`: what an index is of, and which stores it was made of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from rd_torch.disk import write_whole
from rd_torch.store import Facts, Store

FORMAT: Final = 1
CONFIG_FILE: Final = "config.json"


@dataclass(frozen=True)
class Source:
    """A store that an index is of.

    Attributes:
        path: the store, as an absolute path.
        beside: the same path as seen from the index's folder, which holds where both are moved together.
        checksum: checksum of the store's records.
        records: number of its records.
    """

    path: str
    beside: str
    checksum: str
    records: int

    @classmethod
    def of(cls, store: Store, folder: Path) -> Self:
        """Describe a store as a source of the index in a folder."""
        path = store.path.resolve()
        return cls(str(path), os.path.relpath(path, folder.resolve()), store.checksum or "", len(store))


@dataclass(frozen=True)
class IndexConfig:
    """What an index is of.

    Attributes:
        facts: what the stores were embedded with.
        first_width: number of first features that the first stage compares.
        is_exact: whether the first stage compares each query with every protein.
        vectors: name of the file with the vectors of the first stage.
        sources: the stores, in the order of their records' places.
        parts: fingerprints of parts of the model that suffice for the first stage, by their last level.
    """

    facts: Facts
    first_width: int
    is_exact: bool
    vectors: str
    sources: tuple[Source, ...]
    parts: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the config into an index's folder; with it the index is whole."""
        stated = {
            "format": FORMAT,
            "facts": json.loads(self.facts.to_json()),
            "first_width": self.first_width,
            "is_exact": self.is_exact,
            "vectors": self.vectors,
            "sources": [vars(source) for source in self.sources],
            "parts": self.parts,
        }
        write_whole(folder / CONFIG_FILE, lambda part: part.write_text(json.dumps(stated, indent=1) + "\n"))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the config of an index.

        Raises:
            FileNotFoundError: where there is nothing at the path.
            ValueError: for anything but an index, and one of a later format.
        """
        path = folder / CONFIG_FILE
        if not folder.exists():
            raise FileNotFoundError(f"expected an index at {folder}, got nothing there")
        if not path.is_file():
            raise ValueError(
                f"expected an index, a folder that rd-torch index wrote, got something else: {folder}"
            )
        stated = json.loads(path.read_text())
        if "first_width" not in stated:
            raise ValueError(
                f"expected an index, a folder that rd-torch index wrote, got something else: {folder}"
            )
        if stated.pop("format") != FORMAT:
            raise ValueError(f"expected an index of format {FORMAT}, got one of a later rd_torch: {folder}")
        facts = Facts.from_json(json.dumps(stated.pop("facts")))
        sources = tuple(Source(**source) for source in stated.pop("sources"))
        return cls(facts=facts, sources=sources, **stated)

    @property
    def first_level(self) -> str:
        """The smallest level that has the features of the first stage."""
        pairs = zip(self.facts.levels, self.facts.widths, strict=True)
        return next(level for level, width in pairs if width >= self.first_width)
