"""Attention within each sequence of a packing, by the fastest kernel that the device has for it.

| where | kernel |
|---|---|
| CUDA, half precision, Ampere or newer | `varlen_attn`: one call over the packed tokens |
| CPU with AVX512-BF16, bfloat16, no graph recorded | matrix products on blocks of scores that fit a cache |
| everywhere else, and the reference | scaled dot-product attention on buckets of similar length |

All of them take packed `(tokens, heads, size)` tensors and give one back.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from rd_torch.packing import Packing

HALF: Final = (torch.float16, torch.bfloat16)

VARLEN_SIZES: Final = range(16, 129, 8)
"""Head sizes that `varlen_attn` is used for."""

AMPERE: Final = (8, 0)

# Scores that are computed at a time on the CPU: 4 MiB in bfloat16, which a last-level cache holds.
BLOCK: Final = 1 << 21


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """`softmax(q k' / sqrt(size)) v` within each sequence: `(tokens, heads, size)` in and out."""
    if packing.is_padded:
        return _by_buckets(q, k, v, packing)
    if q.is_cuda and q.dtype in HALF and q.shape[-1] in VARLEN_SIZES and _has_varlen(q.device):
        edges, longest = packing.boundaries, packing.longest
        return cast(Tensor, varlen_attn(q, k, v, edges, edges, longest, longest))
    if q.dtype == torch.bfloat16 and _multiplies_bfloat16(q.device) and not torch.is_grad_enabled():
        return _by_blocks(q, k, v, packing)
    return _by_buckets(q, k, v, packing)


@cache
def _has_varlen(device: torch.device) -> bool:
    """Whether the GPU is one that `varlen_attn` runs on."""
    return torch.cuda.get_device_capability(device) >= AMPERE


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU whose vector units multiply in bfloat16."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _by_buckets(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One call a bucket, with a mask only where its lengths differ."""
    mixed = [
        bucket.gather(
            functional.scaled_dot_product_attention(
                bucket.spread(q), bucket.spread(k), bucket.spread(v), bucket.mask
            )
        )
        for bucket in packing.buckets
    ]
    return torch.cat(mixed) if mixed else q


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Sequence by sequence, a few heads (of long sequences: a few rows of one head) at a time.

    Twice as fast as PyTorch's own kernel for bfloat16 on CPUs that multiply in it. Scores are rounded
    to bfloat16; the softmax runs in float32.
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
                out[some, row : row + rows] = torch.bmm(scores.softmax(-1), values[some])
    return mixed


def attention_maps(q: Tensor, k: Tensor, packing: Packing) -> Tensor:
    """Attention of packed `q` to packed `k`, `(batch, heads, time, time)`, zeros at padding."""
    padded_q, padded_k = packing.unpack(q), packing.unpack(k)
    scores = torch.einsum("bihd,bjhd->bhij", padded_q * q.shape[-1] ** -0.5, padded_k)
    keys, queries = packing.real[:, None, None, :], packing.real[:, None, :, None]
    lowest = torch.finfo(scores.dtype).min
    maps = scores.masked_fill(~keys, lowest).softmax(
        -1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    return maps.to(scores.dtype).masked_fill(~(keys & queries), 0)
