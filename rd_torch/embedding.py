"""Strings or FASTA to vectors, a few or a proteome."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, TypedDict, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.batching import ahead, plan_batches, require_memory, run_batches
from rd_torch.config import check_choice
from rd_torch.esm2 import ESM2
from rd_torch.model import RDModel
from rd_torch.preparing import obstacle
from rd_torch.sequences import normalized, normalized_proteins
from rd_torch.store import Facts, Names, Pool, Row, SaveDtype, Window, Work, cut_windows, format_of
from rd_torch.store.folder import Failure
from rd_torch.store.work import Compute, Progress, in_residues
from rd_torch.tokens import is_residue

WINDOWS_AHEAD: Final = 1
"""Windows that are read while one is embedded."""


class EmbedOptions(TypedDict, total=False):
    """What `embed` may be told."""

    pool: Pool
    width: int | None
    tokens_per_batch: int | None


def embed(
    model: RDModel,
    sequences: Sequence[str],
    *,
    pool: Pool = "mean",
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Embeds sequences and returns arrays in their order.

    Letters that are no residue are read as X, with one warning that counts them. On CUDA a model in `eval`
    mode is prepared by `prepare_inference` first, unless the sequences fit into one batch.

    Args:
        model: the chain; batches go to its device.
        sequences: amino-acid letters, in any case; an empty list gives an empty result.
        pool: `"mean"` averages over residues, `"none"` keeps one row a residue.
        width: features to return; by default all.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default what half of the
            free memory takes. Halved, with a warning, when memory runs out all the same.

    Returns:
        `(sequences, width)` for `"mean"`, a list of `(residues, width)` for `"none"`; in the maps'
        dtype, float32 unless the model is double.

    Raises:
        TypeError: for one string in place of several.
        ValueError: for an empty sequence, a pool or width that does not exist.
        MemoryError: for a sequence that takes more memory than there is.
    """
    if isinstance(sequences, str):
        raise TypeError("expected a sequence of strings, got one string: put it in a list")
    check_choice("pool", pool, ("mean", "none"))
    residues = list(normalized(sequences))
    budget, device = plan_batches(model.family(width).values(), tokens_per_batch)
    if sum(map(len, residues)) > budget:  # one batch is done sooner than anything is compiled for it
        prepare(model)
    arrays = {
        index: tensor.numpy()
        for batch in run_batches(vectors_of(model, pool, width), residues, budget, device)
        for index, tensor in zip(batch.indices, batch.result, strict=True)
    }
    ordered = [arrays[index] for index in range(len(arrays))]
    if pool == "none":
        return ordered
    features = model.embed_dim if width is None else width
    return np.stack(ordered) if ordered else np.zeros((0, features), dtype=np.float32)


def embed_to_store(
    model: RDModel,
    proteins: Iterable[tuple[str, str]],
    path: str | Path,
    *,
    form: str | None = None,
    save_dtype: SaveDtype = "float32",
    name: str = "",
    progress: Progress = lambda residues, before: None,
    **options: Unpack[EmbedOptions],
) -> dict[str, Failure]:
    """Embeds proteins into an embedding file or folder, which `rd_torch.open_store` reads.

    Called again after a kill, a full disk or a crash it goes on where it was: what is done stays as it is,
    and at most one window of about 16 batches is embedded again. The store appears under its name when the
    last protein is in it; until then its parts lie in `<path>.part`. Records keep their order. A record
    whose identifier another one has is stored as `IDENTIFIER#2`, with a warning that counts them; equal
    sequences are embedded as often as they come. A sequence that alone takes more memory than there is is
    left out, and listed in `<path>.failed.tsv`. On CUDA a model in `eval` mode is prepared by
    `prepare_inference` first.

    Args:
        model: the chain.
        proteins: identifiers and sequences, as `rd_torch.Fasta` reads them; may be a generator, memory does
            not grow with their number. Letters that are no residue are read as X, as in `embed`.
        path: the store; its suffix tells the format.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: what the store holds; bfloat16 in `"pt"` alone.
        name: what the model is called in the store.
        progress: called with residues that are done, and whether they were so before.
        **options: `pool`, `width` and `tokens_per_batch` of `embed`.

    Returns:
        Residues and reason of each record that could not be embedded, by name.

    Raises:
        FileNotFoundError: when the folder is not there.
        BlockingIOError: when another process writes the same store.
        ValueError: for no proteins, a pool, width, dtype or format that does not exist, or a store that was
            begun with other sequences, another model or other choices.
    """
    given = options.get("tokens_per_batch")
    budget, _ = plan_batches(model.family(options.get("width")).values(), given)
    wanted = facts_of(model, name, save_dtype, budget, **options)
    with Work(Path(path), format_of(path, form), wanted, fixed_budget=given is not None) as work:
        names = Names(work.format.key)
        cut = cut_windows(normalized_proteins(proteins), work.facts.tokens_per_batch, names)
        with closing(ahead(cut, WINDOWS_AHEAD)) as windows:
            failures = work.fill(windows, embed_windows(model, work.facts), in_residues(progress))
    warn_renamed(names.renamed)
    return failures


def embed_windows(model: RDModel, facts: Facts) -> Compute[str]:
    """What embeds a window of records for a store of these facts, batch by batch."""
    prepare(model)
    compute = vectors_of(model, facts.pool, facts.width)
    device = next(model.backbones.parameters()).device
    dtype = getattr(torch, facts.save_dtype)

    def batches(window: Window[str], failures: dict[int, str]) -> Iterator[list[Row]]:
        """The rows of a window, batch by batch."""
        budget = facts.tokens_per_batch
        for batch in run_batches(compute, window.contents, budget, device, failures=failures):
            rows = (array.to(dtype) for array in batch.result)
            yield list(zip(batch.indices, rows, strict=True))

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
    pool = options.get("pool", "mean")
    check_choice("pool", pool, ("mean", "none"))
    prefixes = model.config.prefixes(options.get("width") or model.embed_dim)
    return Facts(
        model=name,
        fingerprint=model.fingerprint(),
        levels=tuple(prefixes),
        widths=tuple(prefixes.values()),
        num_layers=cast(ESM2, model.backbones[list(prefixes)[-1]]).num_layers,
        pool=pool,
        backbone_dtype=str(next(model.backbones.parameters()).dtype).removeprefix("torch."),
        save_dtype=save_dtype,
        tokens_per_batch=budget,
    )


def prepare(model: RDModel) -> None:
    """Makes a model in `eval` mode ready for inference where that makes it faster, once.

    One with modules of others in it, or with hooks, is left as it is: nobody has asked for more.
    """
    if not model.training and obstacle(model.family()) is None:
        model.prepare_inference()


def vectors_of(model: RDModel, pool: Pool, width: int | None) -> Callable[[Tensor], list[Tensor]]:
    """What embeds a batch of tokens: one tensor a sequence, on the CPU."""
    family = model.family(width).values()

    @torch.inference_mode()
    def vectors(tokens: Tensor) -> list[Tensor]:
        """One tensor a sequence."""
        require_memory(family, tokens)
        return _pooled(model.encode(tokens, width=width), is_residue(tokens), pool)

    return vectors


def _pooled(embeddings: Tensor, residues: Tensor, pool: Pool) -> list[Tensor]:
    """One tensor a sequence, over its residues alone."""
    rows, counts = embeddings[residues], residues.sum(1)
    if pool == "none":
        return list(rows.cpu().split(counts.tolist()))
    # In float64 and row after row: the mean of a prefix is the prefix of the mean, to the bit.
    exact = hardware.float64_device(rows.device)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64, device=exact)
    sums.index_add_(0, residues.nonzero()[:, 0].to(exact), rows.to(exact, torch.float64))
    return list((sums / counts[:, None].to(exact)).to(rows.dtype).cpu())
