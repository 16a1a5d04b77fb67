"""Embed a few sequences into arrays, or a proteome into a store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack, cast

import numpy as np
import torch

from rd_torch.batching import plan_batches
from rd_torch.choices import check_names
from rd_torch.embedder import Embedder, prepare_where_possible, require_tokens_for
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
"""Number of windows of records that are read while one is embedded."""


class EmbedOptions(TypedDict, total=False):
    """Options of `embed`, where they are described."""

    pool: Pools
    width: int | None
    tokens_per_batch: int | None
    windows: int | tuple[int, int] | None


class StoreOptions(EmbedOptions, total=False):
    """Options of `embed_to_store`, where they are described; `embed` has the first ones too."""

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
    """Embed sequences, and return arrays in the order of the sequences.

    Letters that are no residue are read as X, with one warning that counts them. The model runs in `eval`
    mode and without gradients; afterwards each of its modules is back in its own mode. On CUDA a model that
    is in `eval` mode is prepared by `prepare_inference` first, unless the sequences fit into one batch.

    Args:
        model: the chain; batches go to its device.
        sequences: amino-acid letters, in upper or lower case: a list, tuple, iterator, pandas Series or
            Index, one-dimensional numpy array or pyarrow column of strings, `Bio.Seq` objects, records, or
            `(identifier, sequence)` pairs; or `rd_torch.Fasta`. An empty list gives an empty result.
        pool: how the embeddings of residues become one vector: `"mean"`, `"max"` or `"std"` over residues,
            `"cls"` for the embedding of `<cls>`, or several of these, such as `["mean", "max"]`, whose
            vectors are joined end to end; `"none"` keeps a row for each residue. Of raw embeddings only means
            can be nested afterwards, by `combine`.
        width: number of features to return for each way to pool; by default all.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes. It is halved, with a warning, if memory runs out all the same.
        windows: number of residues above which a sequence is cut into overlapping pieces of that length,
            whose embeddings are blended as `Pieces` says; or that number and the number of residues that
            neighbouring pieces share, by default a quarter. By default sequences stay whole.

    Returns:
        `(sequences, ways * width)`, or for `"none"` a list of `(residues, width)`; in the dtype of the maps,
        which is float32 unless the model is double.

    Raises:
        TypeError: for a container without an order or with more than one meaning, such as a set, a table or
            one string, and for an item that is no sequence, with its number, from 1.
        ValueError: for an empty sequence or characters that are no letters, with the number of the sequence,
            for a sequence of more tokens than a backbone has positions for, and for a `pool`, `width` or
            `windows` that does not exist.
        MemoryError: for a sequence that alone takes more memory than there is.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> rd_torch.embed(model, ["MQIFVK", "MKV"], width=48).shape
        (2, 48)
        >>> [rows.shape for rows in rd_torch.embed(model, ["MQIFVK", "MKV"], pool="none")]
        [(6, 128), (3, 128)]
    """
    way = pool_name(pool)
    pieces = None if windows is None else Pieces.of(windows, way)
    require_tokens_for(model.alphabet, way, pieces)
    residues = list(normalize_sequences(sequences_of(sequences), model.alphabet.kind))
    budget, device = plan_batches(model.family(width).values(), tokens_per_batch)
    if sum(map(len, residues)) > budget:  # preparing takes longer than one batch does
        prepare_where_possible(model)
    embedder = Embedder(model, way, width, pieces, budget, device)
    with evaluating(model):
        arrays = {
            index: tensor.numpy() for rows in embedder(dict(enumerate(residues))) for index, tensor in rows
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
    """Embed proteins into a store, a file or folder that `rd_torch.open_store` reads.

    The same call after a kill, a full disk or a crash goes on where it was: what is done stays as it is, and
    at most one window of records, which are about 16 batches, is embedded again. The store appears under its
    name when the last protein is in it; until then its parts lie in `<path>.part`.

    Records keep their order. A record whose identifier an earlier one has is stored as `IDENTIFIER#2`, with a
    warning that counts such records; equal sequences are embedded as often as they come. A record that cannot
    be read is left out, and so is a sequence that alone takes more memory than there is, or more tokens than
    a backbone has positions for; `<path>.failed.tsv` lists them with their lines and the reasons. The model
    runs in `eval` mode, as in `embed`; on CUDA a model that is in `eval` mode is prepared by
    `prepare_inference` first.

    Args:
        model: the chain.
        proteins: `rd_torch.Fasta` or `rd_torch.Proteins`, or an iterable of `(identifier, sequence)` pairs or
            `SeqRecord`s. It may be a generator: memory does not grow with the number of proteins. Letters
            that are no residue are read as X, as in `embed`.
        path: the store; its suffix names the format.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: type of the numbers in the store; only `"pt"` takes bfloat16.
        name: name of the model, for the store.
        progress: function that is called with a number of residues that are done, and with True if an earlier
            run did them, else False.
        **options: `pool`, `width`, `tokens_per_batch` and `windows` are as in `embed`. If `strict` is true,
            letters that are no residue are refused, and the run stops at the first record that cannot be
            read. `max_length` is the number of residues to keep of each sequence. `shard` is for several
            processes, on machines that see one folder, whose calls differ in it alone: `(3, 16)` or `"3/16"`
            embeds every 16th window of records from the third on; `"auto"` takes the shard that Slurm or
            torchrun gives this process; `"finish"` embeds nothing but puts the store together, as the last
            shard to end does by itself.

    Returns:
        The records that could not be embedded, by name, each with its residues, reason, file and line. A
        shard that was not the last to end returns those of its own windows.

    Raises:
        FileNotFoundError: if the folder of `path` is not there.
        BlockingIOError: if another process writes the same store.
        TypeError: for anything that does not iterate over records, such as a table, strings or a path.
        ValueError: for no proteins; for a pool, width, dtype or format that does not exist; for a store that
            was begun with other sequences, another model or other choices; and, if strict, for a record that
            cannot be read.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> proteins = [("one", "MQIFVK"), ("two", "MKV"), ("three", "M1")]
        >>> failures = rd_torch.embed_to_store(model, proteins, "proteins.parquet")
        >>> list(rd_torch.open_store("proteins.parquet")), list(failures)
        (['one', 'two'], ['three'])
    """
    check_names(options, StoreOptions.__annotations__)
    form_of_store = format_of(path, form)
    entries, corrections = entries_of(proteins, form_of_store.identifier), Corrections()
    shard = options.get("shard")
    only_finish = shard == "finish"
    own_shard = None if shard is None or only_finish else Shard.of(shard)
    asked_budget = options.get("tokens_per_batch")
    budget, _ = plan_batches(model.family(options.get("width")).values(), asked_budget)
    facts = facts_of(model, name, save_dtype, budget, **select_embed_options(options))
    is_fixed = asked_budget is not None
    with Work(Path(path), form_of_store, facts, fixed_budget=is_fixed, shard=own_shard) as work:
        names = Names(work.format.key)
        read = normalize_entries(
            entries,
            corrections,
            strict=options.get("strict", False),
            max_length=options.get("max_length"),
            kind=model.alphabet.kind,
        )
        cut = cut_windows(read, work.facts.tokens_per_batch, names)
        with closing(run_ahead(cut, WINDOWS_AHEAD)) as windows:
            compute = None if only_finish else window_embedder(model, work.facts)
            failures = work.fill(windows, compute, progress)
    corrections.warn()
    warn_of_renamed(names.renamed)
    return failures


def select_embed_options(options: Mapping[str, Any]) -> EmbedOptions:
    """Select the options that `embed` has too, all of which are facts of a store."""
    return cast(
        EmbedOptions, {key: each for key, each in options.items() if key in EmbedOptions.__annotations__}
    )


def window_embedder(model: RDModel, facts: Facts) -> Compute[str]:
    """Make a function that embeds a window of records for a store.

    Args:
        model: the chain, which is prepared for inference where possible.
        facts: the facts of the store.

    Returns:
        The function. It takes a window, and a dictionary to which it adds the places and reasons of records
        that could not be embedded; it yields the places and embeddings of the others, batch by batch.
    """
    prepare_where_possible(model)
    pieces = None if facts.windows is None else Pieces(*facts.windows)
    embedder = Embedder(model, facts.pool, facts.width, pieces, facts.tokens_per_batch, model.device)
    dtype = getattr(torch, facts.save_dtype)

    def embed_window(window: Window[str], failures: dict[int, str]) -> Iterator[list[Row]]:
        """Embed the records of a window that have no fault."""
        sound = {
            place: letters for place, letters in enumerate(window.contents) if place not in window.faults
        }
        with evaluating(model):
            for rows in embedder(sound, failures):
                yield [(place, row.to(dtype)) for place, row in rows]

    return embed_window


def warn_of_renamed(records: int) -> None:
    """Warn that so many records share an identifier with an earlier one, if any do."""
    if records:
        warnings.warn(
            f"records whose identifier an earlier record has, stored as IDENTIFIER#2 and so on: {records:,}",
            stacklevel=3,
        )


def facts_of(
    model: RDModel, name: str, save_dtype: SaveDtype, budget: int, **options: Unpack[EmbedOptions]
) -> Facts:
    """State what a store of a model's embeddings holds.

    Args:
        model: the chain.
        name: name of the model, for the store.
        save_dtype: type of the numbers in the store.
        budget: number of tokens that a batch holds at most.
        **options: `pool`, `width` and `windows` as in `embed`.

    Returns:
        The facts of the store.

    Raises:
        ValueError: for a `pool`, `width` or `windows` that does not exist or does not fit the model's tokens.
    """
    pool, windows = pool_name(options.get("pool", "mean")), options.get("windows")
    pieces = None if windows is None else Pieces.of(windows, pool)
    require_tokens_for(model.alphabet, pool, pieces)
    prefixes = model.config.prefixes(options.get("width") or model.embed_dim)
    config = model.config.until(list(prefixes)[-1])
    return Facts(
        model=name,
        fingerprint=model.fingerprint(),
        levels=tuple(prefixes),
        widths=tuple(prefixes.values()),
        num_layers=config.levels[-1].depth,
        pool=pool,
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        save_dtype=save_dtype,
        tokens_per_batch=budget,
        windows=pieces,
        final_norm=config.hidden_norm,
        level_fingerprints=tuple(model.fingerprint(level) for level in prefixes),
    )
