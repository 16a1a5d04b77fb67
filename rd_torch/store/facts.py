"""`Facts`: what was embedded with what. A store keeps them, and a later run must share them to go on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeAlias

from rd_torch.choices import FloatType
from rd_torch.pooling import pools_of

SaveDtype: TypeAlias = FloatType
"""Type of number that a store holds."""

_FREE: Final = ("model", "tokens_per_batch", "rd_torch_version", "level_fingerprints")
"""Facts in which a run that goes on may differ; the last follows from others, and older stores lack it."""


@dataclass(frozen=True)
class Facts:
    """What was embedded with what.

    Attributes:
        model: the model's name, as the user gave it.
        fingerprint: fingerprint of the model's config and tensors; where no backbone ran, of its maps alone.
        levels: names of the levels that the store's width reaches, smallest first.
        widths: number of features up to the end of each level; the last one is the store's width.
        num_layers: number of layers of the largest backbone that ran; None where nobody described it.
        pool: how the residues of a protein became one vector, as `"mean"` or `"mean+max"`; or `"none"` for a
            vector for each residue.
        backbone_dtype: type of number in which the backbones ran; where another program made the raw
            embeddings, the type in which its file holds them.
        save_dtype: type of number that the store holds.
        tokens_per_batch: number of tokens that a batch holds at most, by which batches and windows were cut;
            where no backbone ran, a number of vectors.
        rd_torch_version: version of the program that wrote the store.
        windows: length of the pieces in which longer sequences were embedded, and of their overlap, in
            residues; None where all sequences stayed whole. These have nothing to do with the windows of
            records in which a store is written.
        final_norm: whether the backbones' final LayerNorm acted on levels of hidden layers; None where there
            are none.
        level_fingerprints: fingerprints of the model cut behind each level, any of which gives the first
            features alike; none where no backbone ran.
    """

    model: str
    fingerprint: str
    levels: tuple[str, ...]
    widths: tuple[int, ...]
    num_layers: int | None
    pool: str
    backbone_dtype: str
    save_dtype: SaveDtype
    tokens_per_batch: int
    rd_torch_version: str = version("rd_torch")
    windows: tuple[int, int] | None = None
    final_norm: bool | None = None
    level_fingerprints: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of features of an embedding, for each way to pool."""
        return self.widths[-1]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Column at which the embedding of each way to pool begins in a vector, and the end of the vector."""
        return tuple(self.width * number for number in range(max(1, len(pools_of(self.pool))) + 1))

    @property
    def added(self) -> dict[str, int]:
        """Number of features that each level adds, by level."""
        starts = (0, *self.widths)
        return {name: end - start for name, start, end in zip(self.levels, starts, self.widths, strict=False)}

    def is_windowed(self, length: int | None) -> bool:
        """Whether a record was embedded in pieces.

        Args:
            length: number of its residues; None where nobody counted them.

        Returns:
            True where the length is known, and longer than a piece.
        """
        return self.windows is not None and length is not None and length > self.windows[0]

    def to_json(self) -> str:
        """Return the facts as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Read the facts from JSON; what a later version of the program has added is left out."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in json.loads(text).items() if name in known}
        lists = ("levels", "widths", "windows", "level_fingerprints")
        values |= {name: tuple(values[name]) for name in lists if values.get(name) is not None}
        return cls(**values)

    def require_same(self, other: Facts, path: Path) -> None:
        """Refuse to go on with a store of other facts.

        The model's name, the budget and the program's version may differ.

        Args:
            other: the facts of the store.
            path: the store, which the error names.

        Raises:
            ValueError: where they differ; it names the first fact that does.
        """
        # The fingerprint comes last, because it says least of what is different.
        for field in sorted(fields(self), key=lambda field: field.name == "fingerprint"):
            wanted, found = getattr(self, field.name), getattr(other, field.name)
            if field.name not in _FREE and wanted != found:
                raise ValueError(
                    f"expected {field.name} {found} (model {other.model}), with which {path} was begun, got "
                    f"{wanted} (model {self.model}): use what it was begun with, or choose another output"
                )
