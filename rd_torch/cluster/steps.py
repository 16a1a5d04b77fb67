"""What is done on the machines of a cluster: records read in windows, windows embedded, moments summed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from rd_torch.batching import find_budget, plan_batches
from rd_torch.cluster.workers import Step
from rd_torch.embedding import EmbedOptions, embed, embed_windows
from rd_torch.fitting import add_moments, shared_family
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.reading import Proteins
from rd_torch.sequences import Entry, normalized, normalized_entries, sound
from rd_torch.store import Names, Window, cut_windows
from rd_torch.store.folder import Folder
from rd_torch.store.parquet import level_columns
from rd_torch.sums import Summed

Source: TypeAlias = str | Path | RDModel
"""A model, or what `RDModel.from_pretrained` takes on every machine."""

Load: TypeAlias = Callable[[str], RDModel]
LoadFamily: TypeAlias = Callable[[str], Mapping[str, nn.Module]]
"""Called by every worker with its device."""

_BULK = ("names", "contents", "lengths", "marks")
"""Columns of a window that no driver needs."""


@dataclass(frozen=True)
class Records:
    """The proteins of files that every machine sees.

    Attributes:
        path: a file or folder, or several.
        strict: refuse letters that are no residue, and stop at the first record that cannot be read.
        max_length: residues to keep of each; by default all.
        identifier: what is taken of a header as the identifier, as for `rd_torch.Proteins`.
        columns: the columns of sequences and identifiers in tables, likewise.
    """

    path: Path | Sequence[Path]
    strict: bool = False
    max_length: int | None = None
    identifier: str | None = None
    columns: tuple[str | None, str | None] = (None, None)

    def proteins(self) -> Proteins:
        """The proteins as they are read on this machine.

        Raises:
            ValueError: for standard input and pipes, which no other machine can read.
        """
        paths = [self.path] if isinstance(self.path, str | Path) else self.path
        proteins = Proteins(
            *paths,
            identifier=self.identifier,
            sequence_column=self.columns[0],
            identifier_column=self.columns[1],
        )
        proteins.require_files()
        return proteins

    def windows(
        self, tokens_per_batch: int, names: Names | None = None, identifier: str = "word"
    ) -> Iterator[tuple[Window[str], dict[str, Any]]]:
        """The windows of a local run, each with what is known when its last record has been read.

        Without names, for a fit, records that cannot be read are left out of them, and said beside them.

        Args:
            tokens_per_batch: tokens a batch holds at most.
            names: gives records that share an identifier names of their own.
            identifier: the rule for headers where none was chosen.
        """
        proteins, corrections, read = self.proteins(), Corrections(), 0
        entries = normalized_entries(
            proteins.entries(identifier), corrections, strict=self.strict, max_length=self.max_length
        )
        lost: list[Entry] = []
        if names is None:
            entries = sound(entries, lost)
        last: tuple[Window[str], dict[str, Any]] | None = None
        for window in cut_windows(entries, tokens_per_batch, names):
            if last is not None:
                yield last
            read += window.residues
            known = {"read": read, "fraction": proteins.fraction, "corrections": list(astuple(corrections))}
            last = window, known | {"left_out": json.dumps(lost)}
            lost.clear()
        if last is not None:
            last[1]["left_out"] = json.dumps([*json.loads(last[1]["left_out"]), *lost])
            yield last


def embedding_tables(records: Records, folder: Folder) -> Iterator[pa.Table]:
    """Every window of a store as a table of one row; without its records where the folder has it done.

    Raises:
        ValueError: for records that cannot be read, or other ones than the store was begun with.
    """
    names = Names(folder.format.key)
    for window, known in records.windows(folder.facts.tokens_per_batch, names, folder.format.identifier):
        yield _table(window, known | {"renamed": names.renamed}, folder.done(window) is not None)


def summing_tables(records: Records, tokens_per_batch: int, done: Summed) -> Iterator[pa.Table]:
    """Every window of a fit likewise; without its records where it is done.

    Raises:
        ValueError: for records that cannot be read, or other ones than the fit was begun with.
    """
    for window, known in records.windows(tokens_per_batch):
        yield _table(window, known | {"renamed": 0}, window in done)


def _table(window: Window[str], known: Mapping[str, Any], before: bool) -> pa.Table:
    row = {
        "number": window.number,
        "checksum": window.checksum,
        "residues": window.residues,
        "before": before,
        **{name: [] if before else getattr(window, name) for name in _BULK[:-1]},
        "marks": json.dumps([] if before else [window.places, list(window.faults.items())]),
        **known,
    }
    return pa.table({name: [value] for name, value in row.items()})


class Limits(NamedTuple):
    """What a worker keeps to.

    Attributes:
        is_budget_free: whether batches may be smaller than the store's, for want of memory.
        most_deaths: workers that may die of the same window.
    """

    is_budget_free: bool
    most_deaths: int


def window_embedder(load: Load, device: str, folder: Folder, limits: Limits) -> Step:
    """What embeds a window and writes its files.

    Args:
        load: gives the chain.
        device: where it goes.
        folder: of the store.
        limits: what it keeps to.

    Raises:
        FileNotFoundError: where the folder is not seen.
        ValueError: for another chain than the store's.
    """
    folder = Folder.begun(folder.path, folder.format)
    model, facts = load(device), folder.facts
    if model.fingerprint() != facts.fingerprint:
        raise ValueError(
            f"expected the model {facts.model} on all machines, got another one on this: put its files where "
            "all machines see them"
        )
    if limits.is_budget_free:
        found = find_budget(model.family(facts.width).values(), torch.device(device))
        facts = replace(facts, tokens_per_batch=min(found, facts.tokens_per_batch))
    compute = embed_windows(model, facts)

    def step(table: pa.Table) -> pa.Table:
        """The row of the window, when its files are there."""
        row = table.to_pylist()[0]
        places, faults = json.loads(row["marks"]) or ([], [])
        window = Window(
            row["number"], row["names"], row["contents"], row["lengths"], row["checksum"],
            places=list(map(tuple, places)), faults=dict(faults),
        )  # fmt: skip
        if not row["before"] and folder.done(window) is None:
            _outlive(folder, window, limits.most_deaths)
            failures = dict(window.faults)
            rows = (each for batch in compute(window, failures) for each in batch)
            folder.write(window, rows, failures, apart=True)
        return table.drop_columns(_BULK)

    return step


def forget_deaths(folder: Folder) -> None:
    """Starts the count of workers that died of a window anew."""
    shutil.rmtree(folder.folder / "tries", ignore_errors=True)
    (folder.folder / "tries").mkdir()


def _outlive(folder: Folder, window: Window[str], most_deaths: int) -> None:
    """Counts who tries a window; raises a ChildProcessError when too many have died of it."""
    path = folder.folder / "tries" / f"{window.number:06d}"
    with path.open("ab") as handle:
        handle.write(b".")
    if path.stat().st_size > most_deaths + 1:
        raise ChildProcessError(
            f"expected workers that live, got {most_deaths + 1} that died of the {len(window.names):,} "
            f"records from {window.names[0]} on: run the same command again, it goes on where it was; if "
            "their memory is short, with fewer --workers to a machine"
        )


def column_embedder(load: Load, device: str, column: str, options: EmbedOptions) -> Step:
    """What adds the columns of embeddings to a table."""
    model = load(device)
    prefixes = model.config.prefixes(options.get("width") or model.embed_dim)

    def step(table: pa.Table) -> pa.Table:
        """The table with a column for what each level adds."""
        vectors = np.asarray(embed(model, _sequences(table, column), **options))
        for level, added in level_columns(vectors, list(prefixes), list(prefixes.values())).items():
            if level in table.column_names:
                raise ValueError(f"expected no column {level!r} yet, got one: rename it")
            table = table.append_column(level, added)
        return table

    return step


def gatherer(load: LoadFamily, device: str, column: str, tokens_per_batch: int | None) -> Step:
    """What makes one row of the joint moments of a table's sequences."""
    family = shared_family(load(device))
    budget, place = plan_batches(family.values(), tokens_per_batch)
    width = sum(backbone.embed_dim for backbone in family.values())

    def step(table: pa.Table) -> dict[str, Any]:
        """The columns of a window but for its records, and the moments."""
        sequences = _sequences(table, column)
        moments = RunningMoments(width if sequences else 1, place)  # of nothing, nothing large is sent
        row: dict[str, Any] = {"sequences": add_moments(family, moments, normalized(sequences), budget)}
        count, mean, scatter = moments.parts
        if "number" in table.column_names:
            row |= table.drop_columns(_BULK).to_pylist()[0]
        row |= {"count": count, "mean": mean.cpu().numpy(), "scatter": scatter.cpu().numpy()}
        return {name: np.asarray(value)[None] for name, value in row.items()}

    return step


def _sequences(table: pa.Table, column: str) -> list[str]:
    """The letters in a column, of a window too."""
    if column not in table.column_names:
        raise ValueError(f"expected a column {column!r}, got {', '.join(table.column_names)}")
    values = table[column].combine_chunks()
    if pa.types.is_list(values.type):
        values = values.flatten()
    return [sequence or "" for sequence in values.to_pylist()]


def loaded(source: Source, device: str | None) -> RDModel:
    """A model on a device; where it is, or on the CPU, without one."""
    if isinstance(source, RDModel):
        return source if device is None else source.to(device)
    return RDModel.from_pretrained(source, device=device)


def loaded_family(source: Source | Mapping[str, nn.Module], device: str | None) -> dict[str, nn.Module]:
    """Backbones on a device; likewise."""
    if not isinstance(source, Mapping):
        return dict(loaded(source, device).backbones.items())
    return {name: module if device is None else module.to(device) for name, module in source.items()}
