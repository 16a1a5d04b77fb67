"""Padded `(batch, time)` to packed `(tokens,)` and back: no work is done on padding.

Packed tokens stand sequence after sequence, longest first, so that sequences of similar length
are neighbours and attention can run on whole buckets of them. One packing serves every backbone
of a chain. While tracing (`torch.compile`, `torch.export`) shapes must not depend on values: the
packing is then *padded*, every position counts as a token and a mask keeps attention off padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor

# A sequence joins a bucket while it is at least this share of the bucket's longest: attention does
# at most 1 / 0.85^2 times the work on padding, and a batch needs few calls.
SHORTEST_SHARE = 0.85

# Features in a chunk of tokens: what a layer makes of them stays in a CPU's cache. At least 256 tokens,
# so that its matrix products read the weights seldom, in multiples of what vector units take at a time.
CHUNK_FEATURES = 1024 * 1280
CHUNK_TOKENS = 256
CHUNK_MULTIPLE = 16


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences that share one attention call.

    Attributes:
        start: first packed token of the bucket.
        stop: packed token behind its last.
        rows: number of sequences n.
        length: tokens of its longest sequence.
        slots: `(n * length,)` packed token of each slot, relative to `start`; None where the packed
            tokens are the slots.
        kept: `(stop - start,)` slot of each packed token; None likewise.
        mask: `(n, 1, 1, length)` True at slots that hold a token; None where all do.
    """

    start: int
    stop: int
    rows: int
    length: int
    slots: Tensor | None = None
    kept: Tensor | None = None
    mask: Tensor | None = None

    def spread(self, packed: Tensor) -> Tensor:
        """`(tokens, heads, size)` of the whole batch to this bucket's `(n, heads, length, size)`."""
        here = packed[self.start : self.stop]
        if self.slots is not None:
            here = here.index_select(0, self.slots)  # whose gradient is cheaper than of here[...]
        return here.unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def gather(self, spread: Tensor) -> Tensor:
        """`(n, heads, length, size)` back to this bucket's packed `(stop - start, heads, size)`."""
        slots = spread.transpose(1, 2).flatten(0, 1)
        return slots if self.kept is None else slots.index_select(0, self.kept)


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch stand, and how attention groups them.

    Attributes:
        shape: `(batch, time)` of the padded batch.
        real: `(batch, time)` True at tokens that are not padding.
        index: `(tokens,)` flat place in the padded batch of each packed token; None when the
            packing is padded and every place counts.
        positions: `(tokens,)` column of each token: 0 at the first, padding counted, as fair-esm.
        sequence: `(tokens,)` row of each token.
        edges: packed token at which each sequence begins, and the number of all behind them; empty
            when the packing is padded.
        longest: tokens of the longest sequence; 0 when the packing is padded or holds no token.
    """

    shape: tuple[int, int]
    real: Tensor
    index: Tensor | None
    positions: Tensor
    sequence: Tensor
    edges: tuple[int, ...] = ()
    longest: int = 0

    @classmethod
    def of(cls, real: Tensor) -> Packing:
        """Packs the places where `real`, `(batch, time)` bool, is True."""
        if torch.compiler.is_compiling():
            return cls.padded(real)
        counts = real.sum(1)
        order = torch.argsort(counts, descending=True, stable=True)
        places = torch.arange(real.numel(), device=real.device).view(real.shape)
        index = places[order][real[order]]
        batch, time = real.shape
        lengths = _listed(counts[order])
        return cls(
            shape=(batch, time),
            real=real,
            index=index,
            positions=index % max(time, 1),
            sequence=index // max(time, 1),
            edges=tuple(accumulate((length for length in lengths if length), initial=0)),
            longest=max(lengths, default=0),
        )

    @classmethod
    def padded(cls, real: Tensor) -> Packing:
        """The packing that keeps every place of the batch, padding too, behind a mask."""
        batch, time = real.shape
        places = torch.arange(time, device=real.device)
        rows = torch.arange(batch, device=real.device)
        return cls(
            shape=(batch, time),
            real=real,
            index=None,
            positions=places.expand(batch, time).flatten(),
            sequence=rows[:, None].expand(batch, time).flatten(),
        )

    @cached_property
    def boundaries(self) -> Tensor:
        """`(sequences + 1,)` the edges as an int32 tensor, as kernels want them."""
        return torch.tensor(self.edges, dtype=torch.int32).to(self.real.device, non_blocking=True)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The groups of similar length for attention, in packed order; when padded one, with a mask."""
        if self.index is None:
            batch, time = self.shape
            return (Bucket(0, batch * time, batch, time, mask=self.real[:, None, None, :]),)
        return self._cut_buckets

    @cached_property
    def _cut_buckets(self) -> tuple[Bucket, ...]:
        lengths = [stop - start for start, stop in pairwise(self.edges)]
        return _cut_buckets(lengths, self.real.device)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Packing:
        """The same on another device, as whatever spreads layers over devices asks of their inputs."""
        device = torch.empty(0, device=device).device
        if device == self.real.device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            tensors: dict[str, Any] = {
                each.name: value.to(device, non_blocking=non_blocking)
                for each in fields(self)
                if isinstance(value := getattr(self, each.name), Tensor)
            }
            moved = self._moved[device] = replace(self, **tensors)
        return moved

    @cached_property
    def _moved(self) -> dict[torch.device, Packing]:
        return {}

    def pack(self, padded: Tensor) -> Tensor:
        """`(batch, time, ...)` to `(tokens, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """`(tokens, ...)` to `(batch, time, ...)` where the padded batch is, zeros at padding."""
        packed = packed.to(self.real.device)
        batch, time = self.shape
        if self.index is None:
            padded = packed.unflatten(0, (batch, time))
            real = self.real.view(batch, time, *[1] * (packed.ndim - 1))
            return padded.masked_fill(~real, 0)
        flat = packed.new_zeros(batch * time, *packed.shape[1:])
        return flat.index_copy(0, self.index, packed).unflatten(0, (batch, time))


def _listed(numbers: Tensor) -> list[int]:
    """A tensor's whole numbers, also within `torch.func`, where older versions have no `tolist`."""
    try:
        return cast(list[int], numbers.tolist())
    except RuntimeError:
        return [int(number) for number in numbers]


def _cut_buckets(lengths: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    """Cuts falling lengths into buckets of sequences that are nearly as long as each one's first."""
    buckets: list[Bucket] = []
    first = start = 0
    while first < len(lengths):
        longest = lengths[first]
        last = first
        while last < len(lengths) and lengths[last] >= SHORTEST_SHARE * longest:
            last += 1
        buckets.append(_bucket(lengths[first:last], start, device))
        start = buckets[-1].stop
        first = last
    return tuple(buckets)


def _bucket(lengths: Sequence[int], start: int, device: torch.device) -> Bucket:
    """One bucket of sequences of the given falling lengths, whose first token is `start`."""
    rows, length, stop = len(lengths), lengths[0], start + sum(lengths)
    if lengths[-1] == length:
        return Bucket(start, stop, rows, length)
    counts = torch.tensor(lengths, device=device)
    ends = counts.cumsum(0)
    places = torch.arange(length, device=device)
    mask = places < counts[:, None]
    slots = torch.where(mask, (ends - counts)[:, None] + places, 0)
    kept = mask.flatten().nonzero()[:, 0]
    return Bucket(start, stop, rows, length, slots.flatten(), kept, mask[:, None, None, :])


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], *packed: Tensor, unless: Callable[[], bool] = lambda: False
) -> tuple[Tensor, ...]:
    """Applies a function that treats each packed token by itself, on a CPU chunk by chunk.

    What it makes on the way then stays in the cache and takes memory for one chunk. Where a graph is
    recorded or traced that would gain nothing, and the function is applied at once.

    Args:
        function: packed tensors in, a tuple of packed tensors out.
        *packed: tensors of the same number of tokens; the first tells the width.
        unless: asked where there is more than one chunk; if true, the function is applied at once.
    """
    first = packed[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or is_recorded(*packed):
        return function(*packed)
    most = max(CHUNK_TOKENS, CHUNK_FEATURES // first.shape[-1])
    chunks = ceil(len(first) / most)
    if chunks <= 1 or unless():
        return function(*packed)
    rows = CHUNK_MULTIPLE * ceil(len(first) / (chunks * CHUNK_MULTIPLE))
    pieces = zip(*(part.split(rows) for part in packed), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(function(*piece) for piece in pieces), strict=True))
