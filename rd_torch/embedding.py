"""Strings or FASTA to vectors, a few or a proteome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rd_torch.config import check_choice
from rd_torch.model import RDModel
from rd_torch.sequences import cut_batches, is_residue, normalized, tokenize

DEFAULT_TOKENS_PER_BATCH = 8_192

Pool: TypeAlias = Literal["mean", "none"]


def embed(
    model: RDModel,
    sequences: Sequence[str],
    *,
    pool: Pool = "mean",
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Embeds sequences and returns arrays in their order.

    Letters that are no residue are read as X, with one warning that counts them.

    Args:
        model: the chain; batches go to its device.
        sequences: amino-acid letters, in any case; an empty list gives an empty result.
        pool: `"mean"` averages over residues, `"none"` keeps one row a residue.
        width: features to return; by default all.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default 8,192.

    Returns:
        `(sequences, width)` for `"mean"`, a list of `(residues, width)` for `"none"`; in the maps'
        dtype, float32 unless the model is double.

    Raises:
        TypeError: for one string in place of several.
        ValueError: for an empty sequence, a pool or width that does not exist.
    """
    if isinstance(sequences, str):
        raise TypeError("expected a sequence of strings, got one string: put it in a list")
    arrays: dict[int, np.ndarray] = dict(
        embed_stream(model, normalized(sequences), pool=pool, width=width, tokens_per_batch=tokens_per_batch)
    )
    ordered = [arrays[index] for index in range(len(arrays))]
    if pool == "none":
        return ordered
    features = model.embed_dim if width is None else width
    return np.stack(ordered) if ordered else np.zeros((0, features), dtype=np.float32)


def embed_stream(
    model: RDModel,
    sequences: Iterable[str],
    *,
    pool: Pool = "mean",
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Embeds normalised sequences as they come; yields `(index, array)` in the order of the batches.

    Arguments and errors as for `embed`.
    """
    check_choice("pool", pool, ("mean", "none"))
    model.require_width(width)
    device = next(model.parameters()).device
    budget = DEFAULT_TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch
    for batch in cut_batches(sequences, budget):
        tokens = tokenize([sequence for _, sequence in batch]).to(device)
        with torch.inference_mode():
            embeddings = model.encode(tokens, width=width)
            arrays = _pooled(embeddings, is_residue(tokens), pool)
        yield from zip([index for index, _ in batch], arrays, strict=True)


def _pooled(embeddings: Tensor, residues: Tensor, pool: Pool) -> list[np.ndarray]:
    """One array a sequence, over its residues alone."""
    if pool == "mean":
        sums = (embeddings * residues[..., None]).sum(1)
        return list((sums / residues.sum(1, keepdim=True)).cpu().numpy())
    rows = embeddings[residues].cpu().numpy()
    return np.split(rows, residues.sum(1).cumsum(0).tolist()[:-1])
