"""What a problem of labelled proteins is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rd_torch.heads import Head
from rd_torch.letters import Corrections
from rd_torch.sequences import Protein, normalize

Scores = dict[str, float]


@dataclass(frozen=True)
class Example:
    """A protein and its label: a class for each residue, or a number."""

    sequence: str
    label: Any

    @classmethod
    def cut(cls, sequence: str, label: Any, residues: int) -> Example:
        """Return an example with known letters, cut to so many residues together with its labels."""
        normal = normalize(Protein("", sequence), Corrections(), max_length=residues).sequence
        return cls(normal, label[:residues] if isinstance(label, list) else label)


class Problem(ABC):
    """A question about proteins, with data, features that need no model, a head and scores.

    Attributes:
        title: Title of the table.
        baseline: The name of the features that need no model, and their number.
        metrics: Names of the scores; the first decides when to stop.
        pooled: Whether the head sees one vector for each protein, and not one for each residue.
        rows: Number of vectors in a batch where only a head trains.
    """

    title: str
    baseline: tuple[str, int]
    metrics: tuple[str, ...]
    pooled: bool
    rows: int

    @abstractmethod
    def read(self, data: Path, residues: int) -> dict[str, list[Example]]:
        """Return the examples of the sets "train", "valid" and "test".

        Args:
            data: Folder of the protein data.
            residues: Number of residues at which proteins are cut.
        """

    @abstractmethod
    def head(self, width: int) -> Head:
        """Return a new head for features of the given width."""

    @abstractmethod
    def features(self, sequence: str) -> Tensor:
        """Return the baseline's `(residues, features)`, or `(1, features)` where the head is pooled."""

    @abstractmethod
    def labels(self, labels: Sequence[Any], mask: Tensor) -> Tensor:
        """Return the labels of a batch as a tensor.

        Args:
            labels: The label of each example.
            mask: `(batch, time)`, True at residues.
        """

    @abstractmethod
    def scores(self, predictions: Tensor, labels: Tensor) -> Scores:
        """Return the metrics of everything that has a label, in rows."""

    @abstractmethod
    def constant(self, train: Sequence[Example], test: Sequence[Example]) -> tuple[str, Scores]:
        """Return name and scores of somebody who knows the training labels and looks at no protein."""
