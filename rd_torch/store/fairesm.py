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

from rd_torch.store.facts import Facts, Pool
from rd_torch.store.format import Array, Format, Row, Store, missing, written_whole
from rd_torch.store.naming import file_name
from rd_torch.store.windows import Window

FACTS: Final = "rd_torch.json"
"""What says the facts and the identifiers in FASTA order, beside the records."""

_KEYS: Final[dict[Pool, str]] = {"mean": "mean_representations", "none": "representations"}


class FairESM(Format):
    """A folder of one `.pt` file a record, with the keys of fair-esm's `extract.py`.

    `{"label": identifier, "mean_representations": {layers: (width,)}}`, or `"representations"` of
    `(residues, width)` without pooling. `layers` is the number of layers of the largest backbone that ran,
    and stands for the nested embedding. Files are named by identifiers, as datasets are in HDF5.
    """

    name = "pt"
    dtypes = ("float32", "float16", "bfloat16")
    pools = ("mean", "none")

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
            kept = {"label": name, _KEYS[facts.pool]: {facts.num_layers: row.clone()}}
            buffer = io.BytesIO()  # torch would hide what the disk says
            torch.save(kept, buffer)
            written_whole(path, partial(Path.write_bytes, data=buffer.getvalue()), durable=False)
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
        written_whole(folder / FACTS, lambda part: part.write_text(json.dumps(said)))
        folder.replace(path)

    def open(self, path: Path) -> Store:
        """Reads a folder of this layout, of fair-esm too."""
        return FairESMStore(path)


class FairESMStore(Store):
    """A folder of `.pt` files, opened one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = self.checksum = None
        said = path / FACTS
        if said.is_file():
            kept = json.loads(said.read_text())
            self.facts, self.checksum = Facts.from_json(kept["facts"]), kept["checksum"]
            self._identifiers: list[str] = kept["identifiers"]
            self._paths = {name: path / f"{file_name(name)}.pt" for name in self._identifiers}
            self.pool, self.width = self.facts.pool, self.facts.width
        else:
            self._paths = {
                str(each.relative_to(path).with_suffix("")): each for each in sorted(path.rglob("*.pt"))
            }
            self._identifiers = list(self._paths)
            if not self._paths:
                raise ValueError(f"expected a folder of .pt files, got none in {path}")
            first = self._load(self._identifiers[0])
            self.pool, self.width = ("mean", "none")[first.ndim - 1], first.shape[-1]

    @property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order where it is known."""
        return self._identifiers

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._paths

    def _rows(self, keys: Sequence[str] | range, width: int) -> list[Array]:
        names = [self._identifiers[key] for key in keys] if isinstance(keys, range) else keys
        return [self._load(name)[..., :width].clone() for name in names]

    def _load(self, identifier: str) -> Tensor:
        """The embedding of a record: of the highest layer where there are several."""
        path = self._paths.get(identifier)
        if path is None:
            raise missing(identifier, self.path)
        try:
            kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            layers = kept.get("representations") or kept["mean_representations"]
        except (RuntimeError, KeyError, UnpicklingError) as error:
            raise ValueError(
                f"expected a file with representations or mean_representations, got {path}: {error}"
            ) from error
        return layers[max(layers)]

    def close(self) -> None:
        """Nothing is open between reads."""
