"""What a store is of: the facts that stand in it, and that a run which goes on must share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any, TypeAlias

from rd_torch.config import FloatType
from rd_torch.pooling import pools_of

SaveDtype: TypeAlias = FloatType

_FREE = ("model", "tokens_per_batch", "rd_torch_version")


@dataclass(frozen=True)
class Facts:
    """What was embedded with what.

    Attributes:
        model: what the user called it.
        fingerprint: of its config and tensors; of the maps alone where no backbone ran.
        levels: those that the store's width reaches, smallest first.
        widths: features up to the end of each level; the last one is the store's width.
        num_layers: of the largest backbone that ran.
        pool: how residues became a vector a protein, `"mean"` or `"mean+max"` say, or `"none"`, a vector a
            residue.
        backbone_dtype: what the backbones ran in; of raw embeddings that others made, what these are in.
        save_dtype: what the store holds.
        tokens_per_batch: the budget that batches and windows were cut by; in vectors where no backbone ran.
        rd_torch_version: of the program that wrote the store.
        windows: residues of the pieces in which longer sequences were embedded, and of their overlap; None
            where all stayed whole.
    """

    model: str
    fingerprint: str
    levels: tuple[str, ...]
    widths: tuple[int, ...]
    num_layers: int
    pool: str
    backbone_dtype: str
    save_dtype: SaveDtype
    tokens_per_batch: int
    rd_torch_version: str = version("rd_torch")
    windows: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """Features of an embedding."""
        return self.widths[-1]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where the embedding of each way to pool begins in a vector, and the vector's end."""
        return tuple(self.width * number for number in range(max(1, len(pools_of(self.pool))) + 1))

    @property
    def added(self) -> dict[str, int]:
        """Features that each level adds, by level."""
        starts = (0, *self.widths)
        return {name: end - start for name, start, end in zip(self.levels, starts, self.widths, strict=False)}

    def is_windowed(self, length: int | None) -> bool:
        """Whether a record of so many residues was embedded in windows; not where nobody counted them."""
        return self.windows is not None and length is not None and length > self.windows[0]

    def to_json(self) -> str:
        """The facts as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The facts from their text; what a later version has written beside them is left out."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in json.loads(text).items() if name in known}
        values |= {name: tuple(values[name]) for name in ("levels", "widths", "windows") if values.get(name)}
        return cls(**values)

    def require_same(self, other: Facts, place: str) -> None:
        """Raises a ValueError that names the first fact in which `other`, the store's, differs.

        The model's name, the budget and the program's version may differ.
        """
        for field in sorted(
            fields(self), key=lambda field: field.name == "fingerprint"
        ):  # says least, so last
            wanted, found = getattr(self, field.name), getattr(other, field.name)
            if field.name not in _FREE and wanted != found:
                raise ValueError(
                    f"expected {field.name} {found} (model {other.model}), with which {place} was begun, got "
                    f"{wanted} (model {self.model}): take what it was begun with, or another output"
                )
