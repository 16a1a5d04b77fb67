"""How the embeddings of a protein's residues become one vector.

Of the ways only the mean commutes with the maps, which are affine: means of raw embeddings can be nested
afterwards, maxima and deviations cannot. Prefixes stay prefixes in each, since every feature is pooled alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from rd_torch import hardware

Pool: TypeAlias = Literal["mean", "max", "std", "cls"]
"""Mean, greatest value and standard deviation over residues; what `<cls>`, which is no residue, has."""

Pools: TypeAlias = str | Sequence[str]
"""One way or several, whose vectors then stand one behind the other; `"none"` for a vector a residue."""

POOLS: Final[tuple[Pool, ...]] = get_args(Pool)


def named_pool(pools: Pools) -> str:
    """What a store calls it: `mean`, `mean+max` of several, or `none`.

    Raises:
        ValueError: for a way that does not exist, none, or one that comes twice.
    """
    chosen = pools.split("+") if isinstance(pools, str) else list(pools)
    if chosen == ["none"]:
        return "none"
    known = set(chosen).issubset(POOLS)
    if not chosen or not known or len(set(chosen)) < len(chosen):
        listed = ", ".join(map(repr, POOLS))
        raise ValueError(f"expected pool of {listed}, several of them once each, or 'none', got {pools!r}")
    return "+".join(chosen)


def pools_of(pool: str) -> tuple[str, ...]:
    """The ways that a name joins, in order; none without pooling."""
    return () if pool == "none" else tuple(pool.split("+"))


def pooled(rows: Tensor, counts: Tensor, cls: Tensor, pool: str) -> Tensor:
    """One vector a sequence.

    Args:
        rows: `(residues, width)` embeddings of residues, sequence after sequence.
        counts: `(sequences,)` residues of each.
        cls: `(sequences, width)` embeddings of `<cls>`.
        pool: as `named_pool` has it.

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
    """Means or standard deviations, in float64 and row after row: those of a prefix are a prefix of these."""
    place = hardware.float64_device(rows.device)
    exact, many = rows.to(place, torch.float64), counts.to(place)[:, None]
    owner = torch.arange(len(counts), device=place).repeat_interleave(many[:, 0])
    zeros = exact.new_zeros(len(counts), rows.shape[1])
    mean = zeros.index_add(0, owner, exact) / many
    if way == "mean":
        return mean
    return (zeros.index_add(0, owner, (exact - mean[owner]).square()) / many).sqrt()
