"""The jobs on files: the driver hands records to workers, and makes a store or a model of what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, Unpack

from rd_torch.batching import MOST_TOKENS
from rd_torch.candidates import Candidates, FitOptions, summing_options
from rd_torch.choices import check_names
from rd_torch.cluster.records import Records, read_for_fit, read_for_store
from rd_torch.cluster.steps import (
    Limits,
    Load,
    LoadFamily,
    begin_embedding,
    begin_summing,
    forget_deaths,
    merge_moments,
)
from rd_torch.cluster.workers import AS_MANY_AS_FIT, Workers, run, stream
from rd_torch.embedding import EmbedOptions, facts_of, select_embed_options, warn_of_renamed
from rd_torch.fitting import make_chain
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.pooling import pool_name
from rd_torch.sequences import Entry
from rd_torch.store import (
    FORMATS,
    Failure,
    Folder,
    Format,
    Names,
    SaveDtype,
    Work,
    format_of,
    load_format,
)
from rd_torch.sums import Sums

MOST_DEATHS: Final = 5
"""Number of workers that may die of the same window before the job is given up.

A worker may also die because its machine is switched off, so that one death says little of the window.
"""


class ProgressListener(Protocol):
    """An object that a job tells how far it is."""

    def __call__(self, residues: int, before: bool = False) -> None:
        """Take note that so many more residues are done, or were done before this run."""

    def reach(self, residues: int, fraction: float) -> None:
        """Take note that so many residues have been read, and that they were this share of the files."""


class _Quiet:
    """A `ProgressListener` that ignores what it is told."""

    def __call__(self, residues: int, before: bool = False) -> None:
        """Do nothing."""

    def reach(self, residues: int, fraction: float) -> None:
        """Do nothing."""


QUIET: Final = _Quiet()


class StoreOptions(EmbedOptions, total=False):
    """Options of `embed_to_store` that say how the store is written, besides those of `rd_torch.embed`."""

    form: str | None
    save_dtype: SaveDtype
    name: str


def require_parts(path: Path, form: str | None, pool: str) -> Format:
    """Return the format of a store, if workers can write it, which leaves nothing to put together.

    Args:
        path: the store; its suffix names the format.
        form: name of the format, in place of the suffix.
        pool: how residues become vectors, as `rd_torch.pooling.pool_name` gives it.

    Returns:
        The format.

    Raises:
        ValueError: for HDF5, and for a store of one vector for each residue.
    """
    found = format_of(path, form)
    if not found.in_parts or pool == "none":
        in_parts = [f".{form.name}" for form in map(load_format, FORMATS) if form.in_parts]
        raise ValueError(
            f"expected {' or '.join(in_parts)}, and pooling, on a cluster, got .{found.name} and "
            f"--pool {pool}: take one of those, or leave --cluster out"
        )
    return found


def embed_to_store(
    model: RDModel,
    load: Load,
    records: Records,
    path: Path,
    *,
    workers: Workers = AS_MANY_AS_FIT,
    progress: ProgressListener = QUIET,
    **options: Unpack[StoreOptions],
) -> dict[str, Failure]:
    """Embed files of proteins as `rd_torch.embed_to_store` does, on the cluster that this process has joined.

    Windows, files and store are the same, so that either of the two can finish what the other has begun.

    Args:
        model: the chain; the driver does not run it, but records its facts in the store.
        load: loads the same chain in a worker, onto the worker's device.
        records: the proteins.
        path: the store, on a file system that all machines see.
        workers: number of workers, and the cores and GPUs that each of them gets.
        progress: is told how far the job is.
        **options: `form`, `save_dtype`, `name`, `pool`, `width`, `tokens_per_batch` and `windows` of
            `rd_torch.embed_to_store`.

    Returns:
        The records that could not be embedded, by name.

    Raises:
        ValueError: for HDF5, for a store of one vector for each residue, and as `rd_torch.embed_to_store`.
        OSError: where workers die of the same window again and again, and as `rd_torch.embed_to_store`.
    """
    check_names(options, StoreOptions.__annotations__)
    form = require_parts(path, options.get("form"), pool_name(options.get("pool", "mean")))
    workers, asked = workers.placed(), options.get("tokens_per_batch")
    records = replace(records, kind=model.alphabet.kind)
    # The driver cannot see the workers' memory: windows are cut for the most that a device gains from.
    budget = asked or MOST_TOKENS[workers.device]
    saved, name = options.get("save_dtype", "float32"), options.get("name", "")
    facts = facts_of(model, name, saved, budget, **select_embed_options(options))
    with Work(path.resolve(), form, facts, fixed_budget=asked is not None) as work:
        folder = Folder(work.path, form, work.facts)
        if work.is_finished:
            windows = records.windows(work.facts.tokens_per_batch, Names(form.key), form.identifier)
            return work.fill((window for window, _ in windows), lambda *_: (), progress)
        forget_deaths(folder)
        limits = Limits(asked is None, MOST_DEATHS)
        begin = partial(begin_embedding, load, workers.device, folder, limits)
        read = partial(read_for_store, records, folder)
        last = _follow(run(stream(read), begin, workers), progress, lambda row: None)
        return work.finish(last["number"] + 1, last["checksum"])


def fit(  # noqa: PLR0913  # takes what `rd_torch.fit` takes, and what is the cluster's
    load: LoadFamily,
    records: Records,
    *,
    tokens_per_batch: int | None = None,
    workers: Workers = AS_MANY_AS_FIT,
    progress: ProgressListener = QUIET,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    left_out: list[Entry] | None = None,
    **options: Unpack[FitOptions],
) -> RDModel:
    """Fit a chain to files of proteins as `rd_torch.fit` does, on the cluster that this process has joined.

    Args:
        load: loads the family on the driver and in every worker, onto a device.
        records: the proteins.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default what half
            of a worker's free memory takes.
        workers: number of workers, and the cores and GPUs that each of them gets.
        progress: is told how far the job is.
        provenance: where backbones and sequences come from; it is saved with the model.
        work_folder: as for `rd_torch.fit`, on the driver's machine; either of the two can finish what the
            other has begun.
        left_out: if given, records that could not be read are appended to it.
        **options: further options of `rd_torch.fit`.

    Returns:
        The fitted model in `eval` mode, on the CPU.

    Raises:
        ValueError: as `rd_torch.fit`.
        TypeError: as `rd_torch.fit`.
        OSError: as `rd_torch.fit`.
        ChildProcessError: where a worker cannot be started.
    """
    candidates, workers = Candidates.of(load("cpu"), **options), workers.placed()
    records = replace(records, kind=candidates.kind)
    budget, is_given = tokens_per_batch or MOST_TOKENS[workers.device], tokens_per_batch is not None
    with Sums(candidates.summands(), budget, folder=work_folder, fixed_budget=is_given) as sums:
        read = partial(read_for_fit, records, sums.tokens_per_batch, sums.done)
        summing = summing_options(options)
        begin = partial(begin_summing, load, workers.device, "contents", tokens_per_batch, summing)
        lost: list[Entry] = []
        last = _follow(run(stream(read), begin, workers), progress, partial(_add_window, sums, lost))
        if left_out is not None:
            left_out += sorted(lost, key=lambda entry: (entry.source, entry.line))
        sums.finish(last["number"] + 1)
        return make_chain(candidates, sums, provenance, **options)


def _add_window(sums: Sums, lost: list[Entry], row: Mapping[str, Any]) -> None:
    """Add a window's moments, unless they were there before, and the records that were left out of it."""
    lost += [Entry(*entry) for entry in json.loads(str(row["left_out"]))]
    if not row["before"]:
        merge_moments(sums, row)
        sums.mark_done(row["number"], row["checksum"])


def _follow(
    rows: Iterable[Mapping[str, Any]], progress: ProgressListener, add: Callable[[Mapping[str, Any]], object]
) -> Mapping[str, Any]:
    """Take the rows of windows as they come, report progress, and warn; return the last window's row."""
    # Rows come in any order. Each window counts names and corrections from the first record of all to its own
    # last one, so that the last window has the totals.
    last: Mapping[str, Any] = {"number": -1}
    for row in rows:
        add(row)
        if row["number"] > last["number"]:
            last = row
            progress.reach(row["read"], row["fraction"])
        progress(row["residues"], row["before"])
    warn_of_renamed(last["renamed"])
    Corrections(*last["corrections"]).warn()
    return last
