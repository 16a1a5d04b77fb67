"""The clock of whatever runs on a device, and how fast a GPU multiplies."""

from __future__ import annotations

import time

import torch


def now(device: str) -> float:
    """Return the time in seconds, after the device has done its work.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate() -> float:
    """Return operations a second in bf16 products of matrices of size 8192, the best of five times twenty."""
    size, repeats = 8192, 20
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(6):  # the first warms up
        start = now("cuda")
        for _ in range(repeats):
            torch.matmul(left, right, out=out)
        seconds.append(now("cuda") - start)
    return 2 * size**3 * repeats / min(seconds[1:])
