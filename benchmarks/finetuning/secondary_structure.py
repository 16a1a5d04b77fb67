"""Three-state secondary structure of residues.

Data: `residue/ss3_{train,valid,test}.csv.gz`; labels are C, H and E, and `-` where the structure is not
resolved. The baselines are the majority class, and a one-hot window of seven residues to each side with the
same head. Scores are accuracy, and the area under the precision-recall curve of each class, averaged.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional

from benchmarks.finetuning.problem import Example, Problem, Scores
from rd_torch.heads import UNLABELLED, Head, ResidueHead
from rd_torch.letters import RESIDUE_LETTERS

STATES = "CHE"
REACH = 7
LETTERS = len(RESIDUE_LETTERS)


class SecondaryStructure(Problem):
    """The problem: is a residue in a coil, a helix or a strand?"""

    title = "Three-state secondary structure"
    baseline = (f"one-hot window of {2 * REACH + 1}", (2 * REACH + 1) * LETTERS)
    metrics = ("accuracy", "macro AUPR")
    pooled = False
    rows = 4096

    def read(self, data: Path, residues: int) -> dict[str, list[Example]]:
        sets = {}
        for name in ("train", "valid", "test"):
            with gzip.open(data / "residue" / f"ss3_{name}.csv.gz", "rt") as handle:
                sets[name] = [
                    Example.cut(row["sequence"], [classify(state) for state in states], residues)
                    for row in csv.DictReader(handle)
                    if set(states := row["label"][:residues]) & set(STATES)
                ]
        return sets

    def head(self, width: int) -> Head:
        return ResidueHead(width, len(STATES), task="classification", hidden=64)

    def features(self, sequence: str) -> Tensor:
        ids = torch.tensor([RESIDUE_LETTERS.index(letter) for letter in sequence])
        padded = functional.pad(functional.one_hot(ids, LETTERS).float(), (0, 0, REACH, REACH))
        return padded.unfold(0, 2 * REACH + 1, 1).flatten(1)

    def labels(self, labels: Sequence[Any], mask: Tensor) -> Tensor:
        aligned = torch.full(mask.shape, UNLABELLED)
        aligned[mask] = torch.tensor([each for row in labels for each in row])
        return aligned

    def scores(self, predictions: Tensor, labels: Tensor) -> Scores:
        return scores(predictions.softmax(-1).numpy(), labels.numpy())

    def constant(self, train: Sequence[Example], test: Sequence[Example]) -> tuple[str, Scores]:
        counts = Counter(label for each in train for label in each.label if label >= 0)
        truth = np.array([label for each in test for label in each.label if label >= 0])
        shares = np.array([counts[k] / counts.total() for k in range(len(STATES))])
        return "majority class", scores(np.tile(shares, (len(truth), 1)), truth)


def classify(state: str) -> int:
    """Return the class of a letter, or what stands for none."""
    return STATES.index(state) if state in STATES else UNLABELLED


def scores(shares: np.ndarray, truth: np.ndarray) -> Scores:
    """Return accuracy and macro AUPR of `(residues, states)` probabilities."""
    areas = [average_precision_score(truth == k, shares[:, k]) for k in range(len(STATES))]
    return {"accuracy": float((shares.argmax(1) == truth).mean()), "macro AUPR": float(np.mean(areas))}
