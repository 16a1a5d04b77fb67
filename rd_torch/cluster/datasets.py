"""The jobs on Ray datasets that a pipeline already has: `embed_dataset` and `fit_dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Unpack

from torch import nn

from rd_torch.batching import MOST_TOKENS
from rd_torch.candidates import Candidates, FitOptions, summing_options
from rd_torch.cluster.steps import (
    ModelOrName,
    begin_adding_columns,
    begin_summing,
    load_backbones,
    load_model,
    merge_moments,
)
from rd_torch.cluster.workers import AS_MANY_AS_FIT, Worker, Workers, run
from rd_torch.embedding import EmbedOptions
from rd_torch.fitting import make_chain
from rd_torch.model import RDModel
from rd_torch.sums import Sums
from rd_torch.weights import Source

ROWS_PER_BATCH: Final = 1_024
"""Rows that a worker takes at a time: enough for many batches, each of sequences of similar length."""


def embed_dataset(
    dataset: Any,
    model: ModelOrName,
    *,
    column: str = "sequence",
    workers: Workers = AS_MANY_AS_FIT,
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> Any:
    """Add mean embeddings to a Ray dataset: a column for what each level adds, named by the level.

    The columns hold lists of fixed size, as those of a Parquet store do. Other columns stay as they are.

    Args:
        dataset: a `ray.data.Dataset` with amino-acid letters in one of its columns.
        model: a chain, or a name or folder from which `RDModel.from_pretrained` loads one on every machine.
        column: name of the column with the letters.
        workers: number of workers, and the cores and GPUs that each of them gets.
        width: number of features to add; by default all.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default what half
            of a worker's free memory takes.

    Returns:
        Another `ray.data.Dataset`, which is computed when it is read. Reading it raises Ray's errors, whose
        text contains ours: what `rd_torch.embed` raises, or a ValueError where the column is missing or a
        level's column is there already.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError: where no machine has room for one worker.
    """
    workers = workers.placed()
    options: EmbedOptions = {"width": width, "tokens_per_batch": tokens_per_batch}
    return dataset.map_batches(
        Worker,
        fn_constructor_args=(
            partial(begin_adding_columns, partial(load_model, model), workers.device, column, options),
        ),
        batch_size=ROWS_PER_BATCH,
        batch_format="pyarrow",
        **workers.arguments(),
    )


def fit_dataset(
    dataset: Any,
    backbones: ModelOrName | Mapping[str, Source | nn.Module],
    *,
    column: str = "sequence",
    workers: Workers = AS_MANY_AS_FIT,
    tokens_per_batch: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    **options: Unpack[FitOptions],
) -> RDModel:
    """Fit a chain to the sequences of a Ray dataset, in one pass.

    Args:
        dataset: a `ray.data.Dataset` with amino-acid letters in one of its columns.
        backbones: the family by level, smallest first; or a model that has it, or a name or folder from which
            `RDModel.from_pretrained` loads one on every machine.
        column: name of the column with the letters.
        workers: number of workers, and the cores and GPUs that each of them gets.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default what half
            of a worker's free memory takes.
        provenance: where backbones and sequences come from; it is saved with the model.
        **options: further options of `rd_torch.fit`.

    Returns:
        The fitted model in `eval` mode, on the CPU.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError: where the column is missing or no machine has room for one worker, and as `rd_torch.fit`.
        TypeError: as `rd_torch.fit`.
        ChildProcessError: where a worker cannot be started.
    """
    candidates = Candidates.of(load_backbones(backbones, None), **options)
    sums = Sums(candidates.summands(), MOST_TOKENS["cpu"])
    workers = workers.placed()
    load, summing = partial(load_backbones, backbones), summing_options(options)
    begin = partial(begin_summing, load, workers.device, column, tokens_per_batch, summing)
    for row in run(dataset, begin, workers, ROWS_PER_BATCH):
        merge_moments(sums, row)
    return make_chain(candidates, sums, provenance, **options)
