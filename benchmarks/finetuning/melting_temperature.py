"""Melting temperature of proteins.

Data: `sequence/meltome.csv.gz`, in degrees Celsius; a tenth of its training proteins, drawn once, validates.
The baselines are the mean of the training set, and the amino-acid composition with the same head. The score
is Spearman's rank correlation.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.finetuning.problem import Example, Problem, Scores
from rd_torch.heads import Head, SequenceHead
from rd_torch.letters import RESIDUE_LETTERS

LETTERS = len(RESIDUE_LETTERS)
CENTRE, SCALE = 50.0, 10.0
"""In degrees: heads predict (temperature - 50) / 10, numbers of unit size."""


class MeltingTemperature(Problem):
    """The problem: at how many degrees is half of a protein unfolded?"""

    title = "Melting temperature"
    baseline = ("composition", LETTERS)
    metrics = ("Spearman", "error, degrees")
    pooled = True
    rows = 32

    def read(self, data: Path, residues: int) -> dict[str, list[Example]]:
        sets: dict[str, list[Example]] = {"train": [], "test": []}
        with gzip.open(data / "sequence" / "meltome.csv.gz", "rt") as handle:
            for row in csv.DictReader(handle):
                label = (float(row["tm_mean"]) - CENTRE) / SCALE
                sets[row["set"]].append(Example.cut(row["sequence"], label, residues))
        random.Random(0).shuffle(sets["train"])
        tenth = len(sets["train"]) // 10
        return {"train": sets["train"][tenth:], "valid": sets["train"][:tenth], "test": sets["test"]}

    def head(self, width: int) -> Head:
        return SequenceHead(width, 1, task="regression", hidden=64)

    def features(self, sequence: str) -> Tensor:
        ids = torch.tensor([RESIDUE_LETTERS.index(letter) for letter in sequence])
        return torch.bincount(ids, minlength=LETTERS)[None] / len(ids)

    def labels(self, labels: Sequence[Any], mask: Tensor) -> Tensor:
        return torch.tensor(labels)[:, None]

    def scores(self, predictions: Tensor, labels: Tensor) -> Scores:
        error = (predictions.flatten() - labels.flatten()).abs().mean().item() * SCALE
        return {"Spearman": rank_correlation(predictions, labels), "error, degrees": error}

    def constant(self, train: Sequence[Example], test: Sequence[Example]) -> tuple[str, Scores]:
        mean = statistics.mean(each.label for each in train)
        error = statistics.mean(abs(each.label - mean) for each in test) * SCALE
        return "training mean", {"error, degrees": error}  # one rank for all has no correlation


def rank_correlation(predictions: Tensor, labels: Tensor) -> float:
    """Return Spearman's rank correlation; 0 where one prediction for all has no rank."""
    rank = spearmanr(predictions.flatten().numpy(), labels.flatten().numpy()).statistic
    return 0.0 if math.isnan(rank) else float(rank)
