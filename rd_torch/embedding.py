"""Strings or FASTA to vectors, a few or a proteome."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack, cast

import numpy as np
import torch

from rd_torch.batching import plan_batches
from rd_torch.embedder import Embedder, prepare
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.modules import evaluating
from rd_torch.pieces import Pieces
from rd_torch.pooling import Pools, pool_name, pools_of
from rd_torch.reading import entries_of, sequences_of
from rd_torch.sequences import normalize_entries, normalize_sequences
from rd_torch.store import (
    Compute,
    Facts,
    Failure,
    Names,
    ProgressCallback,
    Row,
    SaveDtype,
    Shard,
    Window,
    Work,
    cut_windows,
    format_of,
)
from rd_torch.threads import run_ahead

WINDOWS_AHEAD: Final = 1
"""Windows that are read while one is embedded."""


class EmbedOptions(TypedDict, total=False):
    """What `embed` may be told."""

    pool: Pools
    width: int | None
    tokens_per_batch: int | None
    windows: int | tuple[int, int] | None


class StoreOptions(EmbedOptions, total=False):
    """What `embed_to_store` may be told besides."""

    strict: bool
    max_length: int | None
    shard: tuple[int, int] | str | None


def embed(
    model: RDModel,
    sequences: Iterable[Any],
    *,
    pool: Pools = "mean",
    width: int | None = None,
    tokens_per_batch: int | None = None,
    windows: int | tuple[int, int] | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Embeds sequences and returns arrays in their order.

    Letters that are no residue are read as X, with one warning that counts them. The model runs in `eval`
    mode and without gradients, and every module of it has its own mode again afterwards. On CUDA a model in
    `eval` mode is prepared by `prepare_inference` first, unless the sequences fit into one batch.

    Args:
        model: the chain; batches go to its device.
        sequences: amino-acid letters, in any case: a list, tuple, iterator, pandas Series or Index,
            one-dimensional numpy array or pyarrow column of strings, `Bio.Seq` objects, records, or
            `(identifier, sequence)` pairs; or `rd_torch.Fasta`. An empty list gives an empty result.
        pool: `"mean"`, `"max"` or `"std"` over residues, `"cls"` for the embedding of `<cls>`, or several of
            them, `["mean", "max"]`, whose vectors stand one behind the other; `"none"` keeps one row a
            residue. Only means can be nested afterwards, by `combine`.
        width: features to return, of each way to pool; by default all.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default what half of the
            free memory takes. Halved, with a warning, when memory runs out all the same.
        windows: residues from which a longer sequence is embedded in overlapping pieces of that length,
            blended as `Pieces` says; with a second number, residues that neighbouring pieces share, by
            default a quarter. By default sequences stay whole.

    Returns:
        `(sequences, ways * width)`, or a list of `(residues, width)` for `"none"`; in the maps' dtype,
        float32 unless the model is double.

    Raises:
        TypeError: for what has no order or more than one meaning, as a table, a set or one string, and for an
            item that is no sequence, with its number, from 1.
        ValueError: for an empty sequence or signs that are no letters, with the number of the sequence; a
            pool, width or windows that cannot be.
        MemoryError: for a sequence that takes more memory than there is.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> rd_torch.embed(model, ["MQIFVK", "MKV"], width=48).shape
        (2, 48)
        >>> [rows.shape for rows in rd_torch.embed(model, ["MQIFVK", "MKV"], pool="none")]
        [(6, 128), (3, 128)]
    """
    way = pool_name(pool)
    pieces = None if windows is None else Pieces.of(windows, way)
    residues = list(normalize_sequences(sequences_of(sequences)))
    budget, device = plan_batches(model.family(width).values(), tokens_per_batch)
    if sum(map(len, residues)) > budget:  # one batch is done sooner than anything is compiled for it
        prepare(model)
    embedded = Embedder(model, way, width, pieces, budget, device)
    with evaluating(model):
        arrays = {
            index: tensor.numpy() for rows in embedded(dict(enumerate(residues))) for index, tensor in rows
        }
    ordered = [arrays[index] for index in range(len(arrays))]
    if way == "none":
        return ordered
    features = (model.embed_dim if width is None else width) * len(pools_of(way))
    return np.stack(ordered) if ordered else np.zeros((0, features), dtype=np.float32)


def embed_to_store(
    model: RDModel,
    proteins: Iterable[Any],
    path: str | Path,
    *,
    form: str | None = None,
    save_dtype: SaveDtype = "float32",
    name: str = "",
    progress: ProgressCallback = lambda residues, before: None,
    **options: Unpack[StoreOptions],
) -> dict[str, Failure]:
    """Embeds proteins into an embedding file or folder, which `rd_torch.open_store` reads.

    Called again after a kill, a full disk or a crash it goes on where it was: what is done stays as it is,
    and at most one window of about 16 batches is embedded again. The store appears under its name when the
    last protein is in it; until then its parts lie in `<path>.part`. Records keep their order. A record
    whose identifier another one has is stored as `IDENTIFIER#2`, with a warning that counts them; equal
    sequences are embedded as often as they come. A record that cannot be read, and a sequence that alone
    takes more memory than there is, is left out, and listed in `<path>.failed.tsv` with its line and the
    reason. The model runs in `eval` mode, as in `embed`; on CUDA one that is in it already is prepared by
    `prepare_inference` first.

    Args:
        model: the chain.
        proteins: `rd_torch.Fasta` or `rd_torch.Proteins`, or `(identifier, sequence)` pairs, `SeqRecord`s or
            whatever else iterates over them; may be a generator, memory does not grow with their number.
            Letters that are no residue are read as X, as in `embed`.
        path: the store; its suffix tells the format.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: what the store holds; bfloat16 in `"pt"` alone.
        name: what the model is called in the store.
        progress: called with residues that are done, and whether they were so before.
        **options: `pool`, `width`, `tokens_per_batch` and `windows` of `embed`; `strict`, to refuse letters
            that are no residue and stop at the first record that cannot be read; `max_length`, residues at
            which longer sequences are cut; `shard`, for several processes that are called alike but for it,
            on machines that see one folder: `(3, 16)` or `"3/16"` embeds every 16th window from the third
            on, `"auto"` asks Slurm's or torchrun's environment which, and `"finish"` embeds none and puts
            the store together, which the last shard to end does by itself.

    Returns:
        The records that could not be embedded, by name: residues, reason, file and line of each. Of a shard
        that was not the last to end, those of its windows.

    Raises:
        FileNotFoundError: when the folder is not there.
        BlockingIOError: when another process writes the same store.
        TypeError: for what does not iterate over records, as a table, strings or a path.
        ValueError: for no proteins, a pool, width, dtype or format that does not exist, or a store that was
            begun with other sequences, another model or other choices; when strict, for a record.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> proteins = [("one", "MQIFVK"), ("two", "MKV"), ("three", "M1")]
        >>> failures = rd_torch.embed_to_store(model, proteins, "proteins.parquet")
        >>> list(rd_torch.open_store("proteins.parquet")), list(failures)
        (['one', 'two'], ['three'])
    """
    form_of_store = format_of(path, form)
    entries, corrections = entries_of(proteins, form_of_store.identifier), Corrections()
    strict, max_length = options.pop("strict", False), options.pop("max_length", None)
    shard = options.pop("shard", None)
    only_finish = shard == "finish"
    taken = None if shard is None or only_finish else Shard.of(shard)
    given = options.get("tokens_per_batch")
    budget, _ = plan_batches(model.family(options.get("width")).values(), given)
    wanted = facts_of(model, name, save_dtype, budget, **cast(EmbedOptions, options))
    with Work(Path(path), form_of_store, wanted, fixed_budget=given is not None, shard=taken) as work:
        names = Names(work.format.key)
        read = normalize_entries(entries, corrections, strict=strict, max_length=max_length)
        cut = cut_windows(read, work.facts.tokens_per_batch, names)
        with closing(run_ahead(cut, WINDOWS_AHEAD)) as windows:
            compute = None if only_finish else embed_windows(model, work.facts)
            failures = work.fill(windows, compute, progress)
    corrections.warn()
    warn_renamed(names.renamed)
    return failures


def embed_windows(model: RDModel, facts: Facts) -> Compute[str]:
    """What embeds a window of records for a store of these facts, batch by batch."""
    prepare(model)
    pieces = None if facts.windows is None else Pieces(*facts.windows)
    device = model.device
    embedded = Embedder(model, facts.pool, facts.width, pieces, facts.tokens_per_batch, device)
    dtype = getattr(torch, facts.save_dtype)

    def batches(window: Window[str], failures: dict[int, str]) -> Iterator[list[Row]]:
        """The rows of a window, batch by batch."""
        sound = {
            place: letters for place, letters in enumerate(window.contents) if place not in window.faults
        }
        with evaluating(model):
            for rows in embedded(sound, failures):
                yield [(place, row.to(dtype)) for place, row in rows]

    return batches


def warn_renamed(records: int) -> None:
    """Issues one warning that counts records which share an identifier, none where there are none."""
    if records:
        warnings.warn(
            f"records whose identifier another one has, stored as IDENTIFIER#2 and so on: {records:,}",
            stacklevel=3,
        )


def facts_of(
    model: RDModel, name: str, save_dtype: SaveDtype, budget: int, **options: Unpack[EmbedOptions]
) -> Facts:
    """What a store of the model's embeddings is of.

    Raises:
        ValueError: for a pool or width that does not exist.
    """
    pool, windows = pool_name(options.get("pool", "mean")), options.get("windows")
    prefixes = model.config.prefixes(options.get("width") or model.embed_dim)
    return Facts(
        model=name,
        fingerprint=model.fingerprint(),
        levels=tuple(prefixes),
        widths=tuple(prefixes.values()),
        num_layers=model.backbones[list(prefixes)[-1]].num_layers,
        pool=pool,
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        save_dtype=save_dtype,
        tokens_per_batch=budget,
        windows=None if windows is None else Pieces.of(windows, pool),
    )
