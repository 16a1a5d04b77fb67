"""Compute attention within each sequence of a packing, by the fastest kernel that the device has for it.

| where | kernel |
|---|---|
| CUDA, half precision, Ampere or newer | `varlen_attn`: one call over the packed tokens |
| CPU with AVX512-BF16, bfloat16, no graph recorded | matrix products on blocks of scores that fit a cache |
| everywhere else, and the reference | scaled dot-product attention on buckets of similar length |

Each kernel takes packed `(tokens, heads, size)` tensors and returns one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch import hardware
from rd_torch.backbone.packing import Packing, is_recorded
from rd_torch.backbone.precision import apply_outside_half, at_least_float32

Rotation = tuple[Tensor, Tensor]

# Number of scores that the CPU computes at a time: a choice, 4 MiB in bfloat16, which last-level caches hold.
BLOCK: Final = 1 << 21


def inverse_frequencies(head_size: int) -> Tensor:
    """Return fresh inverse frequencies, `10,000 ** -(k / head_size)` for every even k: `(head_size / 2,)`.

    They are computed in float32 and on the CPU, as fair-esm and transformers do: another order of rounding
    would shift the angles of long sequences by some 1e-4.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return 1 / 10_000.0**exponents


class RotaryEmbedding(nn.Module):
    """The angles of rotary position embeddings (Su et al., arXiv 2104.09864).

    The inverse frequencies of ESM-2 belong to its checkpoints: published ones carry the rounding of
    half-precision training, and fresh ones would shift cosines by up to 0.2. Those of other families are
    computed, and no state dict has them.

    Args:
        head_size: number of features in an attention head.
        stored: whether checkpoints hold the inverse frequencies.
    """

    inv_freq: Tensor

    def __init__(self, head_size: int, stored: bool = True) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("inv_freq", inverse_frequencies(head_size), persistent=stored)

    def renew(self) -> None:
        """Compute the inverse frequencies again, in a new tensor, unless checkpoints hold them."""
        if not self.stored:
            self.inv_freq = inverse_frequencies(2 * len(self.inv_freq)).to(self.inv_freq)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.inv_freq
        self.inv_freq = apply_outside_half(fn, before)
        if self.inv_freq is not before:
            self.renew()  # for `to_empty` makes a tensor without numbers, which no state dict would fill
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """Return cosines and signed sines of `(tokens,)` positions, each `(tokens, 1, head_size)`."""
        angles = positions[:, None, None].to(self.inv_freq.dtype) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Return `(tokens, heads, size)` rotated; feature i of the first half pairs with i of the second."""
    cos, sin = rotation
    exact = heads.to(cos.dtype)
    first, second = exact.chunk(2, dim=-1)
    return torch.addcmul(exact * cos, torch.cat((second, first), dim=-1), sin).to(heads.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Return `softmax(q k' / sqrt(size)) v` within each sequence: `(tokens, heads, size)` in and out."""
    if not packing.longest:  # padded, or without any token
        return _attend_by_buckets(q, k, v, packing)
    kernel = hardware.attention_kernel(q.device, q.dtype, q.shape[-1])
    if kernel == "varlen":
        return attend_varlen(q, k, v, packing.edge_tensor, packing.longest)
    if kernel == "blocks" and not is_recorded(q, k, v):
        return _attend_by_blocks(q, k, v, packing)
    return _attend_by_buckets(q, k, v, packing)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int) -> Tensor:
    """Compute attention by `varlen_attn`.

    Args:
        q: `(tokens, heads, size)` queries.
        k: `(tokens, heads, size)` keys.
        v: `(tokens, heads, size)` values.
        edges: `(sequences + 1,)` int32 edges of the sequences, as `Packing.edge_tensor` has them.
        longest: a number that no length of a sequence exceeds.

    Returns:
        `(tokens, heads, size)`.
    """
    kernel = hardware.varlen_attn()
    assert kernel is not None
    return kernel(q, k, v, edges, edges, longest, longest)


def _attend_by_buckets(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Return attention by one call for each bucket, with a mask only where lengths differ."""
    mixed = [
        bucket.gather(
            functional.scaled_dot_product_attention(
                bucket.spread(q), bucket.spread(k), bucket.spread(v), bucket.mask
            )
        )
        for bucket in packing.buckets
    ]
    return torch.cat(mixed) if mixed else q


def _attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Return attention sequence by sequence, a few heads at a time (of long ones a few rows of one head).

    In bfloat16, on CPUs that multiply in it, this was measured twice as fast as PyTorch's own kernel
    (`benchmarks/README.md`). Scores are rounded to bfloat16; the softmax runs in float32.
    """
    mixed = torch.empty_like(q)
    scale, unused = q.shape[-1] ** -0.5, q.new_empty(())
    for start, stop in pairwise(packing.edges):
        length = stop - start
        queries, keys, values, out = (part[start:stop].transpose(0, 1) for part in (q, k, v, mixed))
        heads, rows = max(1, BLOCK // length**2), max(1, BLOCK // length)
        for first in range(0, len(queries), heads):
            some = slice(first, first + heads)
            for row in range(0, length, rows):
                block = queries[some, row : row + rows]
                scores = torch.baddbmm(unused, block, keys[some].mT, beta=0, alpha=scale)
                torch.softmax(scores, -1, out=scores)  # in place: fresh memory costs as much time again
                out[some, row : row + rows] = torch.bmm(scores, values[some])
    return mixed


def attention_maps(q: Tensor, k: Tensor, packing: Packing) -> Tensor:
    """Return attention maps of packed `q` to packed `k`, `(batch, heads, time, time)`, zeros at padding."""
    padded_q, padded_k = packing.unpack(q), packing.unpack(k)
    scores = torch.einsum("bihd,bjhd->bhij", padded_q * q.shape[-1] ** -0.5, padded_k)
    keys, queries = packing.real[:, None, None, :], packing.real[:, None, :, None]
    lowest = torch.finfo(scores.dtype).min  # not -inf, whose softmax is NaN where a row is all padding
    maps = scores.masked_fill(~keys, lowest).softmax(-1, dtype=at_least_float32(scores.dtype))
    return maps.to(scores.dtype).masked_fill(~(keys & queries), 0)
