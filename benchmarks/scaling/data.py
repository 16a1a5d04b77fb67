"""The data sets: mutations, secondary structure and melting temperature, and how each is split."""

from __future__ import annotations

import csv
import gzip
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.finetuning.melting_temperature import MeltingTemperature
from benchmarks.finetuning.secondary_structure import STATES, SecondaryStructure
from benchmarks.proteins import MAX_RESIDUES
from rd_torch.reading import Fasta

SPLITS = 5
LEAST_VARIANTS = 100
"""Number of variants below which a data set is left out: half of them teach, half judge."""

STRUCTURES = 1_000
"""Number of proteins that teach secondary structure, a fifth of them in each split."""

MUTATIONS = {1: "1 mutation", 2: "2 mutations", 3: "3 or more mutations"}
STRUCTURE, MELTING = "secondary structure", "melting temperature"
TASKS = (*MUTATIONS.values(), STRUCTURE, MELTING)
Split = tuple[np.ndarray, np.ndarray]
Variant = tuple[str, str, float]


@dataclass(frozen=True)
class DataSet:
    """Sequences with labels, and which of its rows teach and which judge.

    Attributes:
        name: Name that no other data set has.
        task: What it asks, one of `TASKS`.
        sequences: Sequences of residues only.
        labels: `(rows,)` numbers or classes; a row is a sequence, or a residue, sequence after sequence.
        splits: For each split the rows that teach and the rows that judge.
        classes: Number of classes; 0 where labels are numbers.
        pool: `"mean"` where a row is a sequence, `"none"` where it is a residue.
    """

    name: str
    task: str
    sequences: Sequence[str]
    labels: np.ndarray
    splits: Sequence[Split]
    classes: int = 0
    pool: str = "mean"

    @cached_property
    def checksum(self) -> str:
        """Return a digest of sequences, labels and splits."""
        arrays = (self.labels, *chain(*self.splits))
        return digest([*self.sequences, *(array.tobytes().hex() for array in arrays)])


def digest(texts: Iterable[str]) -> str:
    """Return thirty-two letters that stand for texts in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\n")
    return total.hexdigest()[:32]


def read_sets(data: Path, proteingym: Path | None, most: int) -> list[DataSet]:
    """Return every data set.

    Args:
        data: Folder of the protein data, whose `dms/` holds assays.
        proteingym: Folder of ProteinGym's files, whose assays take their place; None for those of the data.
        most: Number of variants of a data set at the most.

    Raises:
        SystemExit: If so many variants are too few, or no assay has enough.
    """
    if most < LEAST_VARIANTS:
        raise SystemExit(f"expected at least {LEAST_VARIANTS} --variants of a data set, got {most}")
    assays = data_assays(data) if proteingym is None else proteingym_assays(proteingym)
    mutated = [each for name, variants in assays for each in mutation_sets(name, variants, most)]
    if not mutated:
        raise SystemExit(
            f"expected an assay with {LEAST_VARIANTS} variants of 1, 2, or 3 or more mutations, got none"
        )
    return [*mutated, structure_set(data), melting_set(data)]


def data_assays(data: Path) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the assays of the data folder: name, and mutant, mutated sequence and score of each variant."""
    wild_types = {each.identifier: each.sequence for each in Fasta(data / "dms" / "wild_types.fasta")}
    for path in sorted((data / "dms").glob("*.csv.gz")):
        name = path.name.removesuffix(".csv.gz")
        if name not in wild_types:
            raise SystemExit(f"expected {name} among the wild types, got {', '.join(wild_types)}")
        with gzip.open(path, "rt") as handle:
            rows = list(csv.DictReader(handle))
        yield (
            name,
            [
                (row["mutant"], mutate(wild_types[name], row["mutant"]), float(row["DMS_score"]))
                for row in rows
            ],
        )


def mutate(wild_type: str, mutant: str) -> str:
    """Return the sequence of a mutant such as `A2G:K7R`; positions count from 1.

    Raises:
        ValueError: If the wild type has no such letter at a position.
    """
    letters = list(wild_type)
    for change in mutant.split(":"):
        before, place, after = change[0], int(change[1:-1]) - 1, change[-1]
        if not 0 <= place < len(letters) or letters[place] != before:
            got = letters[place] if 0 <= place < len(letters) else "no such position"
            raise ValueError(f"expected {before} at position {place + 1} of the wild type, got {got}")
        letters[place] = after
    return "".join(letters)


def proteingym_assays(folder: Path) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the assays of a folder of ProteinGym's files, at any depth, as far as their tables are there.

    Proteins longer than what ESM-2 was trained on are left out: cut, they would lose their mutations.

    Raises:
        SystemExit: If the folder has no list of assays, or none of their tables.
    """
    tables = {path.stem: path for path in sorted(folder.rglob("*.csv"))}
    if "DMS_substitutions" not in tables:
        raise SystemExit(f"expected ProteinGym's DMS_substitutions.csv in {folder}, got none")
    names = [row["DMS_id"] for row in _table(tables["DMS_substitutions"], ("DMS_id",))]
    found = [name for name in names if name in tables]
    if not found:
        raise SystemExit(
            f"expected tables of the {len(names):,} assays in {folder}, got none: DMS_id.csv each"
        )
    long = 0
    for name in found:
        rows = _table(tables[name], ("mutant", "mutated_sequence", "DMS_score"))
        if max((len(row["mutated_sequence"]) for row in rows), default=0) > MAX_RESIDUES:
            long += 1
            continue
        yield name, [(row["mutant"], row["mutated_sequence"], float(row["DMS_score"])) for row in rows]
    tqdm.write(
        f"ProteinGym has {len(names):,} assays, {len(names) - len(found):,} without a table in {folder}; "
        f"{long:,} of more than {MAX_RESIDUES:,} residues are left out."
    )


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table that has these columns."""
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle)
        got = list(reader.fieldnames or ())
        if not set(columns) <= set(got):
            raise SystemExit(
                f"expected columns {', '.join(columns)} in {path}, got {', '.join(got) or 'none'}"
            )
        return list(reader)


def mutation_sets(name: str, variants: Sequence[Variant], most: int) -> Iterator[DataSet]:
    """Yield an assay's variants with 1, 2, and 3 or more mutations apart; `most` of each at the most."""
    groups: dict[int, list[Variant]] = defaultdict(list)
    for variant in variants:
        groups[min(3, variant[0].count(":") + 1)].append(variant)
    for count, task in MUTATIONS.items():
        group = groups[count]
        if len(group) < LEAST_VARIANTS:
            continue
        chosen = random.Random(0).sample(group, min(most, len(group)))
        yield DataSet(
            f"{name}, {task}",
            task,
            [sequence for _, sequence, _ in chosen],
            np.array([score for _, _, score in chosen]),
            [halves(len(chosen), seed) for seed in range(SPLITS)],
        )


def halves(rows: int, seed: int) -> Split:
    """Return two random halves of so many rows."""
    order = np.random.default_rng(seed).permutation(rows)
    return order[: rows // 2], order[rows // 2 :]


def structure_set(data: Path) -> DataSet:
    """Return three-state secondary structure.

    Each split learns from other proteins, and all are judged by the same ones.
    """
    sets = SecondaryStructure().read(data, MAX_RESIDUES)
    known = random.Random(0).sample(sets["train"], min(STRUCTURES, len(sets["train"])))
    examples = [*known, *sets["test"]]
    labels = np.array([label for each in examples for label in each.label])
    protein = np.repeat(np.arange(len(examples)), [len(each.sequence) for each in examples])
    labelled = labels >= 0
    judged = np.flatnonzero(labelled & (protein >= len(known)))
    return DataSet(
        STRUCTURE,
        STRUCTURE,
        [each.sequence for each in examples],
        labels,
        [
            (np.flatnonzero(labelled & (protein < len(known)) & (protein % SPLITS == part)), judged)
            for part in range(SPLITS)
        ],
        classes=len(STATES),
        pool="none",
    )


def melting_set(data: Path) -> DataSet:
    """Return melting temperature with the split that it is published with."""
    sets = MeltingTemperature().read(data, MAX_RESIDUES)
    known = [*sets["train"], *sets["valid"]]
    examples = [*known, *sets["test"]]
    rows = np.arange(len(examples))
    return DataSet(
        MELTING,
        MELTING,
        [each.sequence for each in examples],
        np.array([each.label for each in examples]),
        [(rows[: len(known)], rows[len(known) :])],
    )
