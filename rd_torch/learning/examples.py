"""Labelled sequences, and what is to be predicted of them, read from tables or refused."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

import numpy as np

from rd_torch.choices import LearningTask, check_choice
from rd_torch.labelled import FOLDS
from rd_torch.letters import PROTEIN, Corrections, Kind, read_residues
from rd_torch.reading import Cells, find_sequence_column, read_cells

Table: TypeAlias = str | Path | Mapping[str, Sequence[Any]]
"""A file, or columns by name, as those of a pandas DataFrame."""

UNLABELLED: Final = "-"
"""Stands for a residue without a label."""

MISSING: Final = frozenset(("", "na", "nan", "n/a", "none", "null", "<na>", "#n/a"))
"""How a cell without a value is written, in lower case."""

GUESSED_FROM: Final = 20
FEW_NUMBERS: Final = 2
MOST_CLASSES: Final = 100


@dataclass(frozen=True)
class Examples:
    """Sequences with labels.

    Attributes:
        sequences: residues of each sequence.
        task: what is predicted.
        classes: names of the classes or labels; empty for numbers.
        labels: for each sequence a number, the number of a class, or a truth value for each label; per
            residue an array of them, NaN or -1 where there is no label.
        per_residue: whether each residue has a label of its own.
        split: what the split column says of each sequence; None where there is none.
        source: name of the table.
        checksum: SHA-256 of sequences, labels and split.
    """

    sequences: list[str]
    task: LearningTask
    classes: list[str]
    labels: list[Any]
    per_residue: bool
    split: list[str] | None
    source: str
    checksum: str


def read_examples(
    table: Table,
    target: str,
    *,
    task: LearningTask | None = None,
    per_residue: bool = False,
    sequence_column: str | None = None,
    split_column: str | None = None,
    kind: Kind = PROTEIN,
) -> Examples:
    """Read labelled sequences.

    Rows without a label are left out, with a warning that counts them. Everything else that is no sequence
    or no label is refused.

    Args:
        table: a file that `Proteins` reads as a table, or columns by name.
        target: name of the column with the labels: numbers, classes, several labels joined by `;`, or per
            residue a letter for each residue, or numbers with blanks or commas between them.
        task: what is predicted; by default `"regression"` where all labels are numbers, else
            `"classification"`.
        per_residue: whether each residue has a label of its own; `-` stands for none.
        sequence_column: name of the column with the sequences; by default the only one that can be meant.
        split_column: name of the column that says which set or fold a sequence belongs to.
        kind: what the sequences are of.

    Returns:
        The examples.

    Raises:
        FileNotFoundError: where there is no table.
        ValueError: for columns that are not there, a row without a sequence, labels of another kind than the
            task's, labels that are all equal, classes with too few sequences, and too few rows.
    """
    if task is not None:
        check_choice("task", task, get_args(LearningTask))
    cells, source = _cells_of(table)
    names = [name for name in (target, sequence_column, split_column) if name is not None]
    for name in names:
        if name not in cells.header:
            listed = ", ".join(map(repr, cells.header))
            raise ValueError(f"expected a column {name!r}, got {listed} in {source}")
    places = {name: place for place, name in enumerate(cells.header)}
    head = cells.rows[:GUESSED_FROM]
    if sequence_column is None:
        others = [name for name in cells.header if name not in {target, split_column}]
        samples = {name: [row[places[name]] for row in head] for name in others}
        sequence_column = find_sequence_column(samples, source)
    kept = [
        (line, row)
        for line, row in zip(cells.lines, cells.rows, strict=True)
        if row[places[target]].lower() not in MISSING
        or (task == "multilabel" and not row[places[target]])  # a protein of none of the labels
    ]
    if len(kept) < len(cells.rows):
        warnings.warn(f"rows without a label, left out: {len(cells.rows) - len(kept):,}", stacklevel=3)
    sequences = _read_sequences([(line, row[places[sequence_column]]) for line, row in kept], source, kind)
    texts = [(line, row[places[target]]) for line, row in kept]
    split = None if split_column is None else [row[places[split_column]] for _, row in kept]
    read = _read_per_residue if per_residue else _read_whole
    found, classes, labels = read(texts, sequences, task, f"{target!r} of {source}")
    digest = hashlib.sha256()
    for number, (_, text) in enumerate(texts):
        parts = (sequences[number], text, "" if split is None else split[number])
        digest.update("\t".join(parts).encode("utf-8", "surrogateescape") + b"\n")
    return Examples(sequences, found, classes, labels, per_residue, split, source, digest.hexdigest())


def _cells_of(table: Table) -> tuple[Cells, str]:
    """Return the cells of a table as text, and what messages call it."""
    if isinstance(table, str | Path):
        return read_cells(table), str(table)
    try:
        names = [str(name) for name in table]
        columns = [list(table[name]) for name in table]
    except TypeError as error:
        raise TypeError(
            f"expected a file or columns by name, as in a DataFrame, got {type(table).__name__}"
        ) from error
    if len(set(map(len, columns))) > 1:
        listed = ", ".join(f"{len(each):,} of {name!r}" for name, each in zip(names, columns, strict=True))
        raise ValueError(f"expected columns of equal lengths, got {listed}")
    rows = [[_text_of(cell) for cell in row] for row in zip(*columns, strict=True)]
    return Cells(names, list(range(1, len(rows) + 1)), rows), "the table"


def _text_of(cell: object) -> str:
    """Return a cell as a file would have it."""
    return "" if cell is None or cell != cell else str(cell).strip()  # noqa: PLR0124  # NaN differs from itself


def _read_sequences(texts: Sequence[tuple[int, str]], source: str, kind: Kind) -> list[str]:
    """Read the sequences; one warning counts what was changed."""
    corrections, found = Corrections(), []
    for line, text in texts:
        try:
            found.append(read_residues(text, corrections, kind=kind))
        except ValueError as error:
            raise ValueError(f"{error} (line {line:,} of {source})") from error
    corrections.warn()
    if len(found) < 2 * FOLDS:
        raise ValueError(f"expected {2 * FOLDS} labelled sequences or more, got {len(found)} in {source}")
    return found


def _read_whole(
    texts: Sequence[tuple[int, str]], sequences: Sequence[str], task: LearningTask | None, name: str
) -> tuple[LearningTask, list[str], list[Any]]:
    """Read a label of each sequence, or several."""
    cells = [text for _, text in texts]
    if task == "multilabel":
        return "multilabel", *_read_labels(cells, name)
    numbers = [_number_of(text) for text in cells]
    if task == "regression" or (task is None and None not in numbers):
        for (line, text), number in zip(texts, numbers, strict=True):
            if number is None or not math.isfinite(number):
                raise ValueError(f"expected finite numbers in {name}, got {text!r} (line {line:,})")
        different = len(set(numbers))
        if different < 2:
            raise ValueError(f"expected numbers that differ in {name}, got {numbers[0]} alone")
        if task is None and different <= FEW_NUMBERS:
            warnings.warn(
                f"{name} has {different} different numbers, which are taken as numbers: if they are classes, "
                'give the task "classification"',
                stacklevel=4,
            )
        return "regression", [], numbers
    if task is None and sum(number is not None for number in numbers) > len(numbers) // 2:
        line, text = next(each for each, number in zip(texts, numbers, strict=True) if number is None)
        raise ValueError(f"expected numbers in {name}, got {text!r} (line {line:,}): or name the task")
    classes, labels = _read_classes(cells, name)
    return "classification", classes, labels


def _number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_classes(cells: Sequence[str], name: str) -> tuple[list[str], list[int]]:
    """Read the class of each sequence."""
    counts = Counter(cells)
    few = [(kind, count) for kind, count in counts.items() if count < FOLDS]
    if len(counts) < 2 or few or len(counts) > MOST_CLASSES:
        listed = ", ".join(f"{count:,} of {kind!r}" for kind, count in (few or counts.most_common())[:5])
        raise ValueError(
            f"expected 2 to {MOST_CLASSES} classes, each of {FOLDS} sequences or more, got {listed} among "
            f"{len(counts):,} in {name}"
        )
    classes = sorted(counts)
    return classes, [classes.index(each) for each in cells]


def _read_labels(cells: Sequence[str], name: str) -> tuple[list[str], list[np.ndarray]]:
    """Read the labels of each sequence; those that few have are left out, with a warning."""
    sets = [{each.strip() for each in cell.split(";")} - {""} for cell in cells]
    counts = Counter(each for labels in sets for each in labels)
    classes = sorted(each for each, count in counts.items() if FOLDS <= count < len(cells))
    if not classes:
        raise ValueError(f"expected a label that {FOLDS} sequences or more have, not all, got none in {name}")
    if len(classes) < len(counts):
        warnings.warn(
            f"labels of fewer than {FOLDS} sequences, or of all, left out: {len(counts) - len(classes):,}",
            stacklevel=4,
        )
    return classes, [np.array([each in labels for each in classes]) for labels in sets]


def _read_per_residue(
    texts: Sequence[tuple[int, str]], sequences: Sequence[str], task: LearningTask | None, name: str
) -> tuple[LearningTask, list[str], list[Any]]:
    """Read a label of each residue."""
    if task == "multilabel":
        raise ValueError("expected one label a residue, got the task 'multilabel'")
    numeric = task == "regression" or (task is None and _are_lists(texts, sequences))
    split: Callable[[str], list[str]] = (lambda text: text.replace(",", " ").split()) if numeric else list
    parted = [split(text) for _, text in texts]
    for (line, _), parts, sequence in zip(texts, parted, sequences, strict=True):
        if len(parts) != len(sequence):
            raise ValueError(
                f"expected a label for each of {len(sequence):,} residues in {name}, got {len(parts):,} "
                f"(line {line:,})"
            )
    flat = [part for parts in parted for part in parts if part != UNLABELLED]
    ends = np.cumsum([0, *map(len, parted)])
    if not flat:
        raise ValueError(f"expected a label at some residue in {name}, got none")
    if numeric:
        wrong = [part for part in flat if _number_of(part) is None]
        if wrong:
            raise ValueError(f"expected numbers for residues in {name}, got {wrong[0]!r}")
        rows = [math.nan if part == UNLABELLED else float(part) for parts in parted for part in parts]
        known = np.array([float(part) for part in flat])
        if not np.isfinite(known).all() or known.min() == known.max():
            raise ValueError(f"expected finite numbers that differ in {name}, got others")
        values = np.array(rows)
        return "regression", [], [values[start:end] for start, end in pairwise(ends)]
    classes, _ = _read_classes(flat, name)
    codes = {each: place for place, each in enumerate(classes)} | {UNLABELLED: -1}
    values = np.array([codes[part] for parts in parted for part in parts])
    return "classification", classes, [values[start:end] for start, end in pairwise(ends)]


def _are_lists(texts: Sequence[tuple[int, str]], sequences: Sequence[str]) -> bool:
    """Tell whether labels of residues are lists of numbers, and not a letter for each."""
    pairs = list(zip(texts, sequences, strict=True))[:GUESSED_FROM]
    return all(len(text.replace(",", " ").split()) == len(sequence) > 1 for (_, text), sequence in pairs)
