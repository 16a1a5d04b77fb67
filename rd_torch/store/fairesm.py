"""The folder of `.pt` files that fair-esm's `extract.py` writes, for code that reads it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from torch import Tensor

from rd_torch.disk import write_whole
from rd_torch.pooling import POOLS, pools_of
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.naming import file_name
from rd_torch.store.store import Array, Store, missing_message
from rd_torch.store.windows import Length, Window

FACTS: Final = "rd_torch.json"
"""Name of the file beside the records that has the facts, and the identifiers in FASTA order."""

_KEYS: Final = {
    "mean": "mean_representations",
    "cls": "bos_representations",
    "max": "max_representations",
    "std": "std_representations",
    "none": "representations",
}
"""The key of an embedding in its file, by way to pool; fair-esm has the first two and the last."""

LAST_LAYER: Final = -1
"""The layer of an embedding where the number of layers is not known; fair-esm counts the last one so."""


class FairESM(Format):
    """A folder with one `.pt` file for each record, with the keys of fair-esm's `extract.py`.

    A file holds `{"label": identifier, "mean_representations": {layers: (width,)}}`. Without pooling the key
    is `"representations"`, and the embedding `(residues, width)`. Other ways to pool have the keys
    `"bos_representations"`, for `<cls>`, `"max_representations"` and `"std_representations"`. `layers` is the
    number of layers of the largest backbone, or -1 where nobody described it, and stands for the nested
    embedding. Files are named by identifiers, as datasets are in HDF5.
    """

    name = "pt"
    dtypes = ("float32", "float16", "bfloat16")
    pools = (*POOLS, "none")
    identifier = "header"
    in_parts = True

    @staticmethod
    def key(name: str) -> str:
        """Return the name of the record's file without case, as some file systems have it."""
        return file_name(name).casefold()

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Write one file for each record."""
        paths = []
        for place, row in rows:
            name = window.names[place]
            path = folder / f"{file_name(name)}.pt"
            kept: dict[str, Any] = {"label": name}
            for pool, start in zip(pools_of(facts.pool) or ("none",), facts.boundaries, strict=False):
                layer = LAST_LAYER if facts.num_layers is None else facts.num_layers
                kept[_KEYS[pool]] = {layer: row[..., start : start + facts.width].clone()}
            if window.lengths[place] is not None:
                kept["length"] = window.lengths[place]
            buffer = io.BytesIO()  # torch.save to a path would hide an error of the disk
            torch.save(kept, buffer)
            write_whole(path, partial(Path.write_bytes, data=buffer.getvalue()), durable=False)
            paths.append(path)
        return paths

    def finish(self, folder: Path, records: Iterable[tuple[str, Path]], facts: Facts, checksum: str) -> Path:
        """Add the file of facts and identifiers to the folder of the records, which is the store then."""
        known = {
            "facts": facts.to_json(),
            "checksum": checksum,
            "identifiers": [name for name, _ in records],
        }
        write_whole(folder / FACTS, lambda part: part.write_text(json.dumps(known)))
        return folder

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether it is no file: asked after every other format that is a folder."""
        return not path.is_file()

    def open(self, path: Path) -> Store:
        """Open a folder of this layout, written by fair-esm too."""
        return FairESMStore(path)


class FairESMStore(Store):
    """A folder of `.pt` files, which are opened one at a time."""

    _layer_of_all: int | None = None
    """The layer of the embeddings in a folder of another program, as the first file that is read has it."""

    def _open(self) -> None:
        path = self._home
        self.facts = self.checksum = self.model_name = self.layer = None
        file = path / FACTS
        if file.is_file():
            known = json.loads(file.read_text())
            self.facts, self.checksum = Facts.from_json(known["facts"]), known["checksum"]
            self._identifiers: list[str] = known["identifiers"]
            self._paths = {name: path / f"{file_name(name)}.pt" for name in self._identifiers}
            self.pool, self.width = self.facts.pool, self.facts.width
            self.model_name, self.layer = self.facts.model, self.facts.num_layers
        else:
            self._paths = {
                str(each.relative_to(path).with_suffix("")): each for each in sorted(path.rglob("*.pt"))
            }
            self._identifiers = list(self._paths)
            if not self._paths:
                raise ValueError(f"expected a folder of .pt files, got none in {self.path}")
            first = self._load(self._identifiers[0])
            self.pool, self.width = ("mean", "none")[first.ndim - 1], first.shape[-1]
            self.layer = self._layer_of_all

    @property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order where that is known."""
        return self._identifiers

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._paths

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        names = (key if isinstance(key, str) else self._identifiers[key] for key in keys)
        return [
            torch.cat([row[..., each] for each in self._columns(width)], -1) for row in map(self._load, names)
        ]

    def _read(self, identifier: str) -> tuple[Path, dict[str, Any]]:
        """Read the file of a record; returns its path and what is in it."""
        path = self._paths.get(identifier)
        if path is None:
            raise KeyError(missing_message(identifier, self.path))
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f"expected a file of torch.save, got {path}: {error}") from error

    def _load(self, identifier: str) -> Tensor:
        """Read the embedding of a record, that of the highest layer where the file has several."""
        path, kept = self._read(identifier)
        if self.facts is not None:
            parts = [kept[_KEYS[pool]] for pool in pools_of(self.pool) or ("none",)]
            self._require_match(identifier, path, kept.get("label"), max(parts[0]))
            return torch.cat([part[max(part)] for part in parts], -1)
        try:
            layers = kept.get("representations") or kept["mean_representations"]
        except KeyError as error:
            raise ValueError(
                f"expected a file with representations or mean_representations, got {path}: {error}"
            ) from error
        self._require_match(identifier, path, kept.get("label"), max(layers))
        return layers[max(layers)]

    def _require_match(self, identifier: str, path: Path, label: str | None, layer: int) -> None:
        """Refuse a file that states another record than its name does, or another layer than the other files.

        Raises:
            ValueError: for such a file.
        """
        if label not in (None, identifier):
            raise ValueError(
                f"expected the record {identifier!r} in {path}, got that of {label!r}, as its label says: "
                "name the file as its record is called"
            )
        if self.facts is None:
            self._layer_of_all = self._layer_of_all or layer
            if layer != self._layer_of_all:
                raise ValueError(
                    f"expected the embedding of layer {self._layer_of_all} in {path}, as in the folder's "
                    f"other files, got that of layer {layer}"
                )

    def _length_of(self, identifier: str) -> Length:
        return self._read(identifier)[1].get("length")

    def _shut(self) -> None:
        """Nothing is open between reads."""
