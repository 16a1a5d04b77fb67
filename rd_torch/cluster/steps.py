"""What the workers of a cluster do: embed windows, add columns of embeddings, sum moments.

Functions called `begin_...` load a model in a worker and return the step that the worker does to each table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from rd_torch import fitting
from rd_torch.batching import find_budget
from rd_torch.candidates import Candidates, FitOptions
from rd_torch.cluster.records import BULK
from rd_torch.cluster.workers import Step
from rd_torch.embedding import EmbedOptions, embed, window_embedder
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.sequences import normalize_sequences
from rd_torch.store import Folder, Window, level_columns
from rd_torch.sums import Sums
from rd_torch.weights import Source

ModelOrName: TypeAlias = str | Path | RDModel
"""A model, or a name or folder from which `RDModel.from_pretrained` loads it on every machine."""

Load: TypeAlias = Callable[[str], RDModel]
"""Loads a chain onto the device of the worker that calls it."""

LoadFamily: TypeAlias = Callable[[str], Mapping[str, nn.Module]]
"""Loads a family, by level, onto the device of the worker that calls it."""


class Limits(NamedTuple):
    """Limits that a worker keeps to.

    Attributes:
        is_budget_free: whether a worker with little memory may make smaller batches than the store's budget.
        most_deaths: number of workers that may die of the same window before the job is given up.
    """

    is_budget_free: bool
    most_deaths: int


def begin_embedding(load: Load, device: str, folder: Folder, limits: Limits) -> Step:
    """Load the chain in a worker that embeds windows into a store.

    Args:
        load: loads the chain.
        device: the worker's device.
        folder: the folder of the unfinished store.
        limits: limits that the worker keeps to.

    Returns:
        The step: it embeds the window in a table, and writes the window's files.

    Raises:
        FileNotFoundError: where the worker's machine does not see the folder.
        ValueError: where the chain is not the one that the store was begun with.
    """
    folder = Folder.open(folder.path, folder.format)  # raises where this machine does not see the folder
    model, facts = load(device), folder.facts
    if model.fingerprint() != facts.fingerprint:
        raise ValueError(
            f"expected the model {facts.model} on all machines, got another one on this: put its files where "
            "all machines see them"
        )
    if limits.is_budget_free:
        found = find_budget(model.family(facts.width).values(), torch.device(device))
        facts = replace(facts, tokens_per_batch=min(found, facts.tokens_per_batch))
    compute = window_embedder(model, facts)

    def step(table: pa.Table) -> pa.Table:
        """Embed the window in a table; return its row, without the records, when its files are written."""
        row = table.to_pylist()[0]
        origins, faults = json.loads(row["marks"]) or ([], [])
        window = Window(
            row["number"], row["names"], row["contents"], row["lengths"], row["checksum"],
            origins=list(map(tuple, origins)), faults=dict(faults),
        )  # fmt: skip
        if not row["before"] and folder.find_done(window) is None:
            _count_attempt(folder, window, limits.most_deaths)
            failures = dict(window.faults)
            rows = (each for batch in compute(window, failures) for each in batch)
            folder.write(window, rows, failures, apart=True)
        return table.drop_columns(BULK)

    return step


def forget_deaths(folder: Folder) -> None:
    """Set the number of workers that have died of each window back to zero."""
    shutil.rmtree(folder.folder / "tries", ignore_errors=True)
    (folder.folder / "tries").mkdir()


def _count_attempt(folder: Folder, window: Window[str], most_deaths: int) -> None:
    """Count one more attempt at a window; raise a ChildProcessError when too many workers have died of it."""
    path = folder.folder / "tries" / f"{window.number:06d}"
    # The file holds a byte for each attempt, and every attempt before this one ended in a worker's death.
    with path.open("ab") as handle:
        handle.write(b".")
    if path.stat().st_size > most_deaths + 1:
        raise ChildProcessError(
            f"expected workers that live, got {most_deaths + 1} that died of the {len(window.names):,} "
            f"records from {window.names[0]} on: run the same command again, and it goes on where it was; if "
            "memory was short, run it with fewer --workers on each machine"
        )


def begin_adding_columns(load: Load, device: str, column: str, options: EmbedOptions) -> Step:
    """Load the chain in a worker that adds embeddings to the rows of a dataset.

    Args:
        load: loads the chain.
        device: the worker's device.
        column: name of the column that holds the letters.
        options: options of `rd_torch.embed`.

    Returns:
        The step: it adds a column to a table for what each level adds.
    """
    model = load(device)
    prefixes = model.config.prefixes(options.get("width") or model.embed_dim)

    def step(table: pa.Table) -> pa.Table:
        """Embed the sequences of a table; return the table with a column for what each level adds."""
        vectors = np.asarray(embed(model, _sequences(table, column), **options))
        for level, added in level_columns(vectors, list(prefixes), list(prefixes.values())).items():
            if level in table.column_names:
                raise ValueError(f"expected no column {level!r} yet, got one: rename it")
            table = table.append_column(level, added)
        return table

    return step


def begin_summing(
    load: LoadFamily, device: str, column: str, tokens_per_batch: int | None, options: FitOptions
) -> Step:
    """Load the family in a worker that sums the joint moments of a table's sequences.

    Args:
        load: loads the family.
        device: the worker's device.
        column: name of the column that holds the letters.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default what half
            of the worker's free memory takes.
        options: options of `rd_torch.fit` on which the sums depend.

    Returns:
        The step: it makes one row of moments of a table.
    """
    candidates = Candidates.of(load(device), **options)
    budget, place = candidates.plan(tokens_per_batch)
    width, alternatives = sum(candidates.widths.values()), candidates.summands().alternatives

    def step(table: pa.Table) -> dict[str, Any]:
        """Sum the moments of a table; return them with the window's columns, without its records."""
        sequences = _sequences(table, column)
        # A table without sequences sends moments of width 1, not a large matrix of zeros.
        moments = (
            RunningMoments(width, place, alternatives=alternatives) if sequences else RunningMoments(1, place)
        )
        is_window = "number" in table.column_names  # its records were normalised before it was cut
        residues = sequences if is_window else normalize_sequences(sequences, candidates.kind)
        row: dict[str, Any] = {"sequences": candidates.add_moments(moments, residues, budget)}
        count, mean, scatter = moments.parts
        if is_window:
            row |= table.drop_columns(BULK).to_pylist()[0]
        row |= {"count": count, "mean": mean.cpu().numpy(), "scatter": scatter.cpu().numpy()}
        return {name: np.asarray(value)[None] for name, value in row.items()}

    return step


def merge_moments(sums: Sums, row: Mapping[str, Any]) -> None:
    """Add the moments in a row, which the step of `begin_summing` has made, to a family's."""
    if not row["sequences"]:  # its moments have width 1
        return
    mean, scatter = (torch.tensor(row[name]) for name in ("mean", "scatter"))
    alternatives = sums.moments.alternatives
    sums.moments.merge(RunningMoments.of(int(row["count"]), mean, scatter, alternatives=alternatives))
    sums.sequences += int(row["sequences"])


def _sequences(table: pa.Table, column: str) -> list[str]:
    """Return the sequences in a column, whose cells hold one sequence each, or a list of a window's."""
    if column not in table.column_names:
        raise ValueError(f"expected a column {column!r}, got {', '.join(table.column_names)}")
    values = table[column].combine_chunks()
    if pa.types.is_list(values.type):
        values = values.flatten()
    return [sequence or "" for sequence in values.to_pylist()]


def load_model(model: ModelOrName, device: str | None) -> RDModel:
    """Load a model onto a device; without a device, one that is loaded stays where it is.

    Args:
        model: the model, or the name or folder to load it from.
        device: the device; without it, what is loaded comes to the CPU.

    Returns:
        The model.
    """
    if isinstance(model, RDModel):
        return model if device is None else model.to(device)
    return RDModel.from_pretrained(model, device=device)


def load_backbones(
    backbones: ModelOrName | Mapping[str, Source | nn.Module], device: str | None
) -> dict[str, nn.Module]:
    """Load a family's backbones onto a device, as `load_model` does a model.

    Args:
        backbones: the backbones by level, as in `rd_torch.fit`, or the model, name or folder that has them.
        device: the device; without it, backbones that are loaded stay where they are.

    Returns:
        The backbones by level.
    """
    if not isinstance(backbones, Mapping):
        return dict(load_model(backbones, device).family())
    loaded = fitting.load_backbones(backbones, device)
    return {level: module if device is None else module.to(device) for level, module in loaded.items()}
