"""The assays that scores of variants are held against, and what a head that learnt from labels reached."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from scipy.stats import rankdata

import rd_torch
from benchmarks.result import ROOT
from rd_torch.variants import Variant, VariantTable

MUTATIONS: Final = {1: "1 mutation", 2: "2 mutations", 3: "3 or more mutations"}

LEAST: Final = 100
"""Number of variants that a set has at least."""

SUPERVISED: Final = ROOT / "benchmarks" / "results" / "scaling_every_score.jsonl"


class Assay(NamedTuple):
    """Variants of a protein with what was measured.

    Attributes:
        name: Name of the assay, and how many mutations its variants have.
        wild_type: Residues of the wild type.
        variants: The variants.
        measured: `(variants,)` fitness; higher is fitter.
    """

    name: str
    wild_type: str
    variants: Sequence[Variant]
    measured: np.ndarray

    def few(self, count: int) -> Assay:
        """Return the first of these variants, which are in random order."""
        return self._replace(variants=self.variants[:count], measured=self.measured[:count])


def read_assays(data: Path, most: int) -> Iterator[Assay]:
    """Yield the assays of the data folder, those of one, two, and three or more mutations apart.

    Raises:
        SystemExit: If a variant cannot be read.
    """
    for wild in rd_torch.Fasta(data / "dms" / "wild_types.fasta"):
        groups: dict[int, list[tuple[Variant, float]]] = defaultdict(list)
        table = VariantTable(data / "dms" / f"{wild.identifier}.csv.gz", wild.sequence)
        place = table.header.index("DMS_score")
        for row in table:
            if row.variant is None:
                raise SystemExit(f"expected variants of {wild.identifier}, got {row.fault}")
            groups[min(3, len(row.variant.sites))].append((row.variant, float(row.cells[place])))
        for count, title in MUTATIONS.items():
            if len(groups[count]) >= LEAST:
                chosen = random.Random(0).sample(groups[count], min(most, len(groups[count])))
                measured = np.array([score for _, score in chosen])
                name = f"{wild.identifier}, {title}"
                yield Assay(name, wild.sequence, [variant for variant, _ in chosen], measured)


def supervised_scores() -> dict[str, float]:
    """Return the mean score of the linear head on the largest level's plain embedding, by data set."""
    found = defaultdict(list)
    for line in SUPERVISED.read_text().splitlines():
        row = json.loads(line)
        wanted = ("plain, last layer", "1M", "linear", "normed", "all 5,000 sequences")
        if tuple(row[key] for key in ("approach", "level", "head", "middle layers", "fit")) == wanted:
            found[row["data"]].append(row["scores"].get("Spearman", np.nan))
    return {name: float(np.mean(scores)) for name, scores in found.items()}


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of two columns of ranks; 0 where one of them is constant."""
    first, second = rankdata(one), rankdata(other)
    return float(np.corrcoef(first, second)[0, 1]) if np.ptp(first) and np.ptp(second) else 0.0
