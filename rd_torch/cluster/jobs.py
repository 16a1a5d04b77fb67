"""What the driver does: hands records to workers, follows them, and makes a store or a model of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, Unpack

import torch
from torch import nn

from rd_torch.batching import MOST_TOKENS
from rd_torch.cluster.steps import (
    Limits,
    Load,
    LoadFamily,
    Records,
    Source,
    column_embedder,
    embedding_tables,
    forget_deaths,
    gatherer,
    loaded,
    loaded_family,
    summing_tables,
    window_embedder,
)
from rd_torch.cluster.workers import Worker, Workers, run, stream
from rd_torch.embedding import EmbedOptions, facts_of, warn_renamed
from rd_torch.fitting import shared_family
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.pooling import named_pool
from rd_torch.sequences import Entry
from rd_torch.solve import SolveOptions
from rd_torch.store import Format, Names, SaveDtype, Work, format_of
from rd_torch.store.folder import Failure, Folder
from rd_torch.store.work import in_residues
from rd_torch.sums import Sums

FORMATS: Final = ("parquet", "pt")
"""Those whose windows need no further work when the last is done."""

MOST_DEATHS: Final = 5
"""Workers that may die of the same window before the job is given up."""

ROWS_PER_BATCH: Final = 1_024
"""Rows of a dataset that a worker takes at a time, sorted by length."""


class Progress(Protocol):
    """Hears how far a job is."""

    def __call__(self, residues: int, before: bool = False) -> None:
        """So many more residues are done, or were done before this run."""

    def reach(self, residues: int, fraction: float) -> None:
        """So many residues have been read, from this share of the file."""


class _Quiet:
    """Tells nobody."""

    def __call__(self, residues: int, before: bool = False) -> None:
        """Nothing."""

    def reach(self, residues: int, fraction: float) -> None:
        """Nothing."""


AS_MANY_AS_FIT: Final = Workers()
QUIET: Final = _Quiet()


class StoreOptions(EmbedOptions, total=False):
    """What `embed_to_store` may be told of the store."""

    form: str | None
    save_dtype: SaveDtype
    name: str


def require_parts(path: Path, form: str | None, pool: str) -> Format:
    """The format of a store whose windows workers can write.

    Raises:
        ValueError: for HDF5, and without pooling.
    """
    found = format_of(path, form)
    if found.name not in FORMATS or pool == "none":
        raise ValueError(
            f"expected .parquet or .pt, and pooling, on a cluster, got .{found.name} and --pool {pool}: "
            "take one of those, or leave --cluster out"
        )
    return found


def embed_to_store(
    model: RDModel,
    load: Load,
    records: Records,
    path: Path,
    *,
    workers: Workers = AS_MANY_AS_FIT,
    progress: Progress = QUIET,
    **options: Unpack[StoreOptions],
) -> dict[str, Failure]:
    """Embeds a FASTA file as `rd_torch.embed_to_store` does, on the cluster that this process is in.

    The same windows, files and store: what one of the two has begun the other can finish.

    Args:
        model: the chain, of which the driver takes the facts alone.
        load: gives every worker the same chain on its device.
        records: the proteins.
        path: the store, on a file system that all machines see.
        workers: how many, with what.
        progress: hears how far it is.
        **options: `form`, `save_dtype`, `name`, `width`, `tokens_per_batch` and `windows` of
            `rd_torch.embed_to_store`.

    Returns:
        The records that could not be embedded, by name.

    Raises:
        ValueError, OSError: as `rd_torch.embed_to_store`; for HDF5, and without pooling.
        OSError: when workers die of the same window again and again.
    """
    form = require_parts(path, options.get("form"), named_pool(options.get("pool", "mean")))
    workers, given = workers.placed(), options.get("tokens_per_batch")
    budget = given or MOST_TOKENS[workers.device]
    saved, name = options.get("save_dtype", "float32"), options.get("name", "")
    facts = facts_of(model, name, saved, budget, width=options.get("width"), windows=options.get("windows"))
    with Work(path.resolve(), form, facts, fixed_budget=given is not None) as work:
        folder = Folder(work.path, form, work.facts)
        if work.is_finished:
            windows = records.windows(work.facts.tokens_per_batch, Names(form.key), form.identifier)
            return work.fill((window for window, _ in windows), lambda *_: (), in_residues(progress))
        forget_deaths(folder)
        limits = Limits(given is None, MOST_DEATHS)
        begin = partial(window_embedder, load, workers.device, folder, limits)
        read = partial(embedding_tables, records, folder)
        last = _follow(run(stream(read), begin, workers), progress, lambda row: None)
        return work.finish(last["number"] + 1, last["checksum"])


def fit(  # noqa: PLR0913  # takes what `rd_torch.fit` takes, and what is the cluster's
    load: LoadFamily,
    records: Records,
    *,
    tokens_per_batch: int | None = None,
    workers: Workers = AS_MANY_AS_FIT,
    progress: Progress = QUIET,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    left_out: list[Entry] | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a chain to a FASTA file as `rd_torch.fit` does, on the cluster that this process is in.

    Args:
        load: gives the driver and every worker the family on a device.
        records: the proteins.
        tokens_per_batch: tokens a batch holds at most; by default what half of a worker's free memory takes.
        workers: how many, with what.
        progress: hears how far it is.
        provenance: where backbones and sequences come from; saved with the model.
        work_folder: as for `rd_torch.fit`, on the driver's machine: what one of the two has begun the other
            can finish.
        left_out: if given, receives the records that could not be read.
        **options: as for `rd_torch.fit`.

    Raises:
        ValueError, TypeError, OSError: as `rd_torch.fit`.
        ChildProcessError: when a worker cannot be started.
    """
    family, workers = shared_family(load("cpu"), **options), workers.placed()
    budget, is_given = tokens_per_batch or MOST_TOKENS[workers.device], tokens_per_batch is not None
    with Sums(family, budget, folder=work_folder, fixed_budget=is_given) as sums:
        read = partial(summing_tables, records, sums.tokens_per_batch, sums.done)
        begin = partial(gatherer, load, workers.device, "contents", tokens_per_batch)
        lost: list[Entry] = []
        last = _follow(run(stream(read), begin, workers), progress, partial(_add, sums, lost))
        if left_out is not None:
            left_out += sorted(lost, key=lambda entry: (entry.source, entry.line))
        sums.finish(last["number"] + 1)
        return sums.solved(provenance, **options)


def embed_dataset(
    dataset: Any,
    model: Source,
    *,
    column: str = "sequence",
    workers: Workers = AS_MANY_AS_FIT,
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> Any:
    """Adds pooled embeddings to the rows of a Ray dataset: a column for what each level adds, by its name.

    The columns are those of the Parquet store, lists of fixed size; other columns and rows stay as they are.

    Args:
        dataset: a `ray.data.Dataset` with amino-acid letters in a column.
        model: a chain, or what `RDModel.from_pretrained` takes on every machine.
        column: the one with the letters.
        workers: how many, with what.
        width: features to add; by default all.
        tokens_per_batch: as for `rd_torch.embed`.

    Returns:
        Another `ray.data.Dataset`, made as it is read. Reading it raises Ray's errors, which tell ours, of
        `rd_torch.embed`, or of a column that is missing or there already.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError: for workers that no machine has room for.
    """
    workers = workers.placed()
    options: EmbedOptions = {"width": width, "tokens_per_batch": tokens_per_batch}
    return dataset.map_batches(
        Worker,
        fn_constructor_args=(
            partial(column_embedder, partial(loaded, model), workers.device, column, options),
        ),
        batch_size=ROWS_PER_BATCH,
        batch_format="pyarrow",
        **workers.arguments(),
    )


def fit_dataset(
    dataset: Any,
    backbones: Source | Mapping[str, nn.Module],
    *,
    column: str = "sequence",
    workers: Workers = AS_MANY_AS_FIT,
    tokens_per_batch: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a chain to the sequences of a Ray dataset, in one pass.

    Args:
        dataset: a `ray.data.Dataset` with amino-acid letters in a column.
        backbones: the family by level name, or a model or checkpoint that has it.
        column: the one with the letters.
        workers: how many, with what.
        tokens_per_batch, provenance, **options: as for `rd_torch.fit`.

    Returns:
        The fitted model in `eval` mode, on the CPU.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError, TypeError: as `rd_torch.fit`, and for a column that is missing.
        ChildProcessError: when a worker cannot be started.
    """
    sums = Sums(shared_family(loaded_family(backbones, None), **options), MOST_TOKENS["cpu"])
    workers = workers.placed()
    begin = partial(gatherer, partial(loaded_family, backbones), workers.device, column, tokens_per_batch)
    for row in run(dataset, begin, workers, ROWS_PER_BATCH):
        _merge(sums, row)
    return sums.solved(provenance, **options)


def _add(sums: Sums, lost: list[Entry], row: Mapping[str, Any]) -> None:
    """Adds what `gatherer` made of a window, unless its moments were there before, and what it left out."""
    lost += [Entry(*entry) for entry in json.loads(str(row["left_out"]))]
    if not row["before"]:
        _merge(sums, row)
        sums.add(row["number"], row["checksum"])


def _merge(sums: Sums, row: Mapping[str, Any]) -> None:
    """Adds a row of `gatherer`; one of no sequences has no moments."""
    if not row["sequences"]:
        return
    mean, scatter = (torch.tensor(row[name]) for name in ("mean", "scatter"))
    sums.moments.merge(RunningMoments.of(int(row["count"]), mean, scatter))
    sums.sequences += int(row["sequences"])


def _follow(
    rows: Iterable[Mapping[str, Any]], progress: Progress, add: Callable[[Mapping[str, Any]], object]
) -> Mapping[str, Any]:
    """Takes the rows of windows as they come, says how far they are, and warns; returns the last window's."""
    last: Mapping[str, Any] = {"number": -1}
    for row in rows:
        add(row)
        if row["number"] > last["number"]:
            last = row
            progress.reach(row["read"], row["fraction"])
        progress(row["residues"], row["before"])
    warn_renamed(last["renamed"])
    Corrections(*last["corrections"]).warn()
    return last
