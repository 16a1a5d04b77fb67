"""Pack padded `(batch, time)` tokens into `(tokens,)` and unpack them, so that no work is done on padding.

Packed tokens stand sequence after sequence, longest first, so that sequences of similar length
are neighbours and attention can run on whole buckets of them. One packing serves every backbone
of a chain. While tracing (`torch.compile`, `torch.export`) shapes must not depend on values. Then the
packing is *padded*: every position counts as a token, and a mask keeps attention off padding.
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

# A sequence joins a bucket while it is at least this share of the bucket's longest. A choice between work on
# padding, with which attention does at most 1 / 0.85^2 = 1.4 times the needed work, and the number of calls.
SHORTEST_SHARE = 0.85

# Features in a chunk of tokens: 1,024 tokens of the 650M backbone, which were measured faster than 512. Their
# feed-forward block takes 20 MiB in float32, which many a CPU's cache can hold.
CHUNK_FEATURES = 1024 * 1280

# Least number of tokens in a chunk, however wide they are. A choice: with fewer tokens a matrix product reads
# all weights for little work.
CHUNK_TOKENS = 256

# The number of tokens in a chunk is a multiple of this: AVX512 takes so many float32 numbers at once.
CHUNK_MULTIPLE = 16


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences that share one attention call.

    Attributes:
        start: index of the first packed token of the bucket.
        stop: index of the packed token after its last.
        rows: number n of sequences.
        length: number of tokens in the longest sequence. Each sequence has so many slots.
        slots: `(n * length,)` index of the packed token in each slot, counted from `start`; None where all
            sequences are equally long, so that packed tokens and slots are the same.
        kept: `(stop - start,)` slot of each packed token; None likewise.
        mask: `(n, 1, 1, length)`, True at slots that hold a token; None where all do.
    """

    start: int
    stop: int
    rows: int
    length: int
    slots: Tensor | None = None
    kept: Tensor | None = None
    mask: Tensor | None = None

    def spread(self, packed: Tensor) -> Tensor:
        """Return this bucket's part of `(tokens, heads, size)`, spread to `(n, heads, length, size)`."""
        here = packed[self.start : self.stop]
        if self.slots is not None:
            here = here.index_select(0, self.slots)  # its gradient is cheaper than that of here[self.slots]
        return here.unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def gather(self, spread: Tensor) -> Tensor:
        """Return `(n, heads, length, size)` gathered to the bucket's `(stop - start, heads, size)` tokens."""
        slots = spread.transpose(1, 2).flatten(0, 1)
        return slots if self.kept is None else slots.index_select(0, self.kept)


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch stand, and how attention groups them.

    Attributes:
        shape: `(batch, time)`, the shape of the padded batch.
        real: `(batch, time)`, True at tokens that are not padding.
        index: `(tokens,)` place of each packed token in the flattened padded batch; None where the packing
            is padded and every place counts.
        positions: `(tokens,)` column of each token, counted from 0 and with padding, as in fair-esm.
        sequence: `(tokens,)` row of each token.
        edges: index of the packed token at which each sequence begins, and the number of tokens after them;
            empty where the packing is padded.
        longest: number of tokens in the longest sequence; 0 where the packing is padded or has no token.
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
        """Return the packing of the places where `real`, a `(batch, time)` mask, is True."""
        if torch.compiler.is_compiling():
            return cls.padded(real)
        counts = real.sum(1)
        order = torch.argsort(counts, descending=True, stable=True)
        places = torch.arange(real.numel(), device=real.device).view(real.shape)
        index = places[order][real[order]]
        batch, time = real.shape
        lengths = _to_list(counts[order])
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
        """Return the packing that keeps every place of the batch, with a mask for padding."""
        batch, time = real.shape
        places = torch.arange(time, device=real.device)
        rows = torch.arange(batch, device=real.device)
        return cls(
            shape=(batch, time),
            real=real,
            index=None,
            # Expanded and not repeated, which PyTorch 2.11 would export for a batch of this size alone.
            positions=places.expand(batch, time).flatten(),
            sequence=rows[:, None].expand(batch, time).flatten(),
        )

    @cached_property
    def edge_tensor(self) -> Tensor:
        """The edges as a `(sequences + 1,)` int32 tensor, which kernels take."""
        return torch.tensor(self.edges, dtype=torch.int32).to(self.real.device, non_blocking=True)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The groups of similar length for attention, in packed order; a padded packing has one, masked."""
        if self.index is None:
            batch, time = self.shape
            return (Bucket(0, batch * time, batch, time, mask=self.real[:, None, None, :]),)
        return self._packed_buckets

    @cached_property  # once a batch: every layer of every backbone asks
    def _packed_buckets(self) -> tuple[Bucket, ...]:
        lengths = [stop - start for start, stop in pairwise(self.edges)]
        return _cut_buckets(lengths, self.real.device)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Packing:
        """Return the same packing on another device, as code that spreads layers over devices expects."""
        device = torch.empty(0, device=device).device  # gives "cuda" its number
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
        """Return the `(tokens, ...)` of `(batch, time, ...)` that count."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return `(tokens, ...)` as `(batch, time, ...)`, on the batch's device and with zeros at padding."""
        packed = packed.to(self.real.device)
        batch, time = self.shape
        if self.index is None:
            padded = packed.unflatten(0, (batch, time))
            real = self.real.view(batch, time, *[1] * (packed.ndim - 1))
            return padded.masked_fill(~real, 0)
        flat = packed.new_zeros(batch * time, *packed.shape[1:])
        return flat.index_copy(0, self.index, packed).unflatten(0, (batch, time))


def _to_list(numbers: Tensor) -> list[int]:
    """Return a tensor's whole numbers, also within `torch.func`, where PyTorch 2.6 and 2.8 lack `tolist`."""
    try:
        return cast(list[int], numbers.tolist())
    except RuntimeError:
        return [int(number) for number in numbers]


def _cut_buckets(lengths: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    """Return buckets of sequences of falling lengths, each nearly as long as the first in its bucket."""
    buckets: list[Bucket] = []
    first = start = 0
    while first < len(lengths):
        longest = lengths[first]
        last = first
        while last < len(lengths) and lengths[last] >= SHORTEST_SHARE * longest:
            last += 1
        buckets.append(_make_bucket(lengths[first:last], start, device))
        start = buckets[-1].stop
        first = last
    return tuple(buckets)


def _make_bucket(lengths: Sequence[int], start: int, device: torch.device) -> Bucket:
    """Return the bucket of sequences of these falling lengths, whose first packed token is `start`."""
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


def is_recorded(*tensors: Tensor | None) -> bool:
    """Return whether autograd records what is computed from these tensors, of which some may be None."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], *packed: Tensor, unless: Callable[[], bool] = lambda: False
) -> tuple[Tensor, ...]:
    """Apply a function that treats each packed token by itself, on a CPU chunk by chunk.

    What the function computes on the way then stays in the cache, and takes the memory of one chunk. Where a
    graph is recorded or traced that would gain nothing, and the function is applied to all tokens at once.

    Args:
        function: function that takes packed tensors and returns a tuple of packed tensors.
        *packed: tensors of the same number of tokens; the first one has the width that sizes chunks.
        unless: function that is called where there would be several chunks; if it returns true, all tokens
            go at once.

    Returns:
        What the function returns for all tokens together.
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
