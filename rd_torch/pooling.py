"""Turn the embeddings of a protein's residues into one vector.

Of the ways to pool, only the mean commutes with the maps, which are affine: means of raw embeddings can be
nested afterwards, maxima and deviations cannot. With each of them prefixes stay prefixes, because every
feature is pooled by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from rd_torch import hardware

Pool: TypeAlias = Literal["mean", "max", "std", "cls"]
"""A way to pool: mean, maximum or standard deviation over residues, or the embedding of `<cls>`."""

Pools: TypeAlias = str | Sequence[str]
"""One way to pool, or several, whose vectors are joined end to end; `"none"` keeps a vector a residue."""

POOLS: Final[tuple[Pool, ...]] = get_args(Pool)

VARIANT_POOLS: Final = ("sites", "mean-difference", "sites-difference")
"""Ways to pool that only variants of a wild type have; `rd_torch.embed_variants` describes them."""

Vectors = TypeVar("Vectors", np.ndarray, Tensor)


def pool_name(pools: Pools) -> str:
    """Join ways to pool to the name that stores have for them, such as `mean`, `mean+max` or `none`.

    Args:
        pools: one way, several, or such a name.

    Returns:
        The name.

    Raises:
        ValueError: for a way that does not exist, no way, or one that comes twice.
    """
    chosen = pools.split("+") if isinstance(pools, str) else list(pools)
    if chosen == ["none"]:
        return "none"
    known = set(chosen).issubset(POOLS)
    if not chosen or not known or len(set(chosen)) < len(chosen):
        listed = ", ".join(map(repr, POOLS))
        raise ValueError(
            f"expected pool to be one or several of {listed}, each once, or 'none', got {pools!r}"
        )
    return "+".join(chosen)


def pools_of(pool: str) -> tuple[str, ...]:
    """Split a name into the ways that it joins, in their order; `none` joins no way."""
    return () if pool == "none" else tuple(pool.split("+"))


def cut_ways(vectors: Vectors, width: int, pool: str) -> Vectors:
    """Cut vectors to their first features, for each way to pool.

    Args:
        vectors: `(..., ways * features)` array or tensor, or `(..., features)` without pooling.
        width: number of features to keep for each way.
        pool: ways to pool, as `pool_name` joins them.

    Returns:
        `(..., ways * width)`, or `(..., width)`.
    """
    ways = max(1, len(pools_of(pool)))
    parted = vectors.reshape(*vectors.shape[:-1], ways, vectors.shape[-1] // ways)
    return parted[..., :width].reshape(*vectors.shape[:-1], ways * width)


def pool_residues(rows: Tensor, counts: Tensor, cls: Tensor, pool: str) -> Tensor:
    """Pool the residues of each sequence to one vector.

    Args:
        rows: `(residues, width)` embeddings of residues, sequence after sequence.
        counts: `(sequences,)` numbers of residues.
        cls: `(sequences, width)` embeddings of `<cls>`.
        pool: ways to pool, as `pool_name` joins them.

    Returns:
        `(sequences, ways * width)` in the rows' dtype, way after way.
    """
    parts = []
    for way in pools_of(pool):
        if way == "cls":
            parts.append(cls)
        elif way == "max":
            parts.append(torch.stack([part.amax(0) for part in rows.split(counts.tolist())]))
        else:
            parts.append(_moment(rows, counts, way).to(rows))
    return torch.cat(parts, 1)


def _moment(rows: Tensor, counts: Tensor, way: str) -> Tensor:
    """Return means or standard deviations, summed in float64 row by row, so that prefixes stay prefixes."""
    place = hardware.float64_device(rows.device)
    exact, many = rows.to(place, torch.float64), counts.to(place)[:, None]
    owner = torch.arange(len(counts), device=place).repeat_interleave(many[:, 0])
    zeros = exact.new_zeros(len(counts), rows.shape[1])
    mean = zeros.index_add(0, owner, exact) / many
    if way == "mean":
        return mean
    return (zeros.index_add(0, owner, (exact - mean[owner]).square()) / many).sqrt()
