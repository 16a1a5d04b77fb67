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
from rd_torch.store.store import Array, Store, missing
from rd_torch.store.windows import Length, Window

FACTS: Final = "rd_torch.json"
"""What says the facts and the identifiers in FASTA order, beside the records."""

_KEYS: Final = {
    "mean": "mean_representations",
    "cls": "bos_representations",
    "max": "max_representations",
    "std": "std_representations",
    "none": "representations",
}
"""By pooling; fair-esm has the first two and the last."""


class FairESM(Format):
    """A folder of one `.pt` file a record, with the keys of fair-esm's `extract.py`.

    `{"label": identifier, "mean_representations": {layers: (width,)}}`, or `"representations"` of
    `(residues, width)` without pooling; of other ways to pool `"bos_representations"`, for `<cls>`, and
    `"max_representations"` and `"std_representations"`, each under its own key. `layers` is the number of
    layers of the largest backbone that ran, and stands for the nested embedding. Files are named by
    identifiers, as datasets are in HDF5.
    """

    name = "pt"
    dtypes = ("float32", "float16", "bfloat16")
    pools = (*POOLS, "none")
    identifier = "header"

    @staticmethod
    def key(name: str) -> str:
        """File names, in any case: some file systems do not tell them apart."""
        return file_name(name).casefold()

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """One file a record."""
        paths = []
        for place, row in rows:
            name = window.names[place]
            path = folder / f"{file_name(name)}.pt"
            kept: dict[str, Any] = {"label": name}
            for pool, start in zip(pools_of(facts.pool) or ("none",), facts.boundaries, strict=False):
                kept[_KEYS[pool]] = {facts.num_layers: row[..., start : start + facts.width].clone()}
            if window.lengths[place] is not None:
                kept["length"] = window.lengths[place]
            buffer = io.BytesIO()  # torch would hide what the disk says
            torch.save(kept, buffer)
            write_whole(path, partial(Path.write_bytes, data=buffer.getvalue()), durable=False)
            paths.append(path)
        return paths

    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """The folder of the records, with their identifiers in order and the facts, renamed."""
        said = {
            "facts": facts.to_json(),
            "checksum": checksum,
            "identifiers": [name for name, _ in names],
        }
        write_whole(folder / FACTS, lambda part: part.write_text(json.dumps(said)))
        folder.replace(path)

    def open(self, path: Path) -> Store:
        """Reads a folder of this layout, of fair-esm too."""
        return FairESMStore(path)


class FairESMStore(Store):
    """A folder of `.pt` files, opened one at a time."""

    _layer_of_all: int | None = None

    def _open(self) -> None:
        path = self._home
        self.facts = self.checksum = self.model_name = self.layer = None
        said = path / FACTS
        if said.is_file():
            kept = json.loads(said.read_text())
            self.facts, self.checksum = Facts.from_json(kept["facts"]), kept["checksum"]
            self._identifiers: list[str] = kept["identifiers"]
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
        """Names of the records, in FASTA order where it is known."""
        return self._identifiers

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._paths

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        names = (key if isinstance(key, str) else self._identifiers[key] for key in keys)
        return [
            torch.cat([row[..., each] for each in self._columns(width)], -1) for row in map(self._load, names)
        ]

    def _read(self, identifier: str) -> tuple[Path, dict[str, Any]]:
        """The file of a record, and what is in it."""
        path = self._paths.get(identifier)
        if path is None:
            raise missing(identifier, self.path)
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f"expected a file of torch.save, got {path}: {error}") from error

    def _load(self, identifier: str) -> Tensor:
        """The embedding of a record: of the highest layer where there are several."""
        path, kept = self._read(identifier)
        if self.facts is not None:
            parts = [kept[_KEYS[pool]] for pool in pools_of(self.pool) or ("none",)]
            self._check(identifier, path, kept.get("label"), max(parts[0]))
            return torch.cat([part[max(part)] for part in parts], -1)
        try:
            layers = kept.get("representations") or kept["mean_representations"]
        except KeyError as error:
            raise ValueError(
                f"expected a file with representations or mean_representations, got {path}: {error}"
            ) from error
        self._check(identifier, path, kept.get("label"), max(layers))
        return layers[max(layers)]

    def _check(self, identifier: str, path: Path, label: str | None, layer: int) -> None:
        """Raises a ValueError where a file states another record, or another layer, than the others do."""
        if label not in (None, identifier):
            raise ValueError(
                f"expected the record {identifier!r} in {path}, got that of {label!r}, as its label says: "
                "name the "
                "file as its record is called"
            )
        if self.facts is None:
            self._layer_of_all = self._layer_of_all or layer
            if layer != self._layer_of_all:
                raise ValueError(
                    f"expected the embedding of layer {self._layer_of_all} in {path}, as in the folder's "
                    "other files, "
                    f"got that of layer {layer}"
                )

    def _length_of(self, identifier: str) -> Length:
        return self._read(identifier)[1].get("length")

    def _shut(self) -> None:
        """Nothing is open between reads."""
