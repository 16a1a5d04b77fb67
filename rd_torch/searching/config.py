"""`IndexConfig`: what an index is of, and which stores it was made of."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

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
        vectors: checksum of their vectors.
    """

    path: str
    beside: str
    checksum: str
    records: int
    vectors: str

    @classmethod
    def of(cls, store: Store, folder: Path, vectors: str) -> Self:
        """Describe a store as a source of the index in a folder."""
        path = store.path.resolve()
        beside = os.path.relpath(path, folder.resolve())
        return cls(str(path), beside, store.checksum or "", len(store), vectors)


@dataclass(frozen=True)
class IndexConfig:
    """What an index is of.

    Attributes:
        facts: what the stores were embedded with.
        first_width: number of first features that the first stage compares.
        is_exact: whether the first stage compares each query with every protein.
        mean: checksum of the mean that vectors are taken from.
        sources: the stores, in the order of their records' places.
        recall: share of the ten nearest proteins by all features that are among 300 candidates of the first
            stage, measured on some of the indexed ones; None where it was not measured.
    """

    facts: Facts
    first_width: int
    is_exact: bool
    mean: str
    sources: tuple[Source, ...]
    recall: float | None = None

    def write(self, folder: Path) -> None:
        """Write the config into an index's folder; with it the index is whole."""
        stated = {"format": FORMAT} | asdict(self)
        write_whole(folder / CONFIG_FILE, lambda part: part.write_text(json.dumps(stated, indent=1) + "\n"))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the config of an index.

        Raises:
            FileNotFoundError: where there is nothing at the path.
            ValueError: for anything but an index, and one of a later format.
        """
        if not folder.exists():
            raise FileNotFoundError(f"expected an index at {folder}, got nothing there")
        stated = _read_stated(folder / CONFIG_FILE)
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

    @property
    def vectors_file(self) -> str:
        """Name of the file with the vectors of the first stage."""
        return f"first-{len(self.sources):06d}.faiss"

    @property
    def identity(self) -> str:
        """Digest of all that a search in the index depends on, wherever its stores lie."""
        contents = [(source.checksum, source.vectors) for source in self.sources]
        stated = [self.facts.fingerprint, self.first_width, self.is_exact, self.mean, contents]
        return hashlib.blake2b(json.dumps(stated).encode(), digest_size=16).hexdigest()


def checks_file(number: int) -> str:
    """Return the name of the file with a check of each vector of a store, by the store's number."""
    return f"checks-{number:06d}.npy"


def _read_stated(path: Path) -> dict[str, Any]:
    """Return what a config states; nothing where there is none."""
    try:
        stated = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}
