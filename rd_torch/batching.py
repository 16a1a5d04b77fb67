"""Sequences through a model in batches: a token budget found from free memory, halved when it runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.backbone import ESM2, tokenize
from rd_torch.config import SPECIAL_TOKENS
from rd_torch.sequences import cut_batches

Result = TypeVar("Result")

MOST_TOKENS: Final = {"cpu": 8_192, "cuda": 32_768}
"""Tokens a batch by type of device from which larger batches are not faster."""

LEAST_TOKENS: Final = 1_024

SHARE_OF_FREE: Final = 0.5
"""Share of the free memory that a batch is planned to take: the estimate is rough, others allocate too."""

# What oneDNN and C++ say, without a type of their own. oneDNN says more where a shape is the trouble.
_SHORT_OF_MEMORY: Final = ("could not create a primitive", "could not execute a primitive", "std::bad_alloc")


class Batch(NamedTuple, Generic[Result]):
    """One batch that went through.

    Attributes:
        indices: the number of each sequence in the input.
        result: what was computed of them.
    """

    indices: list[int]
    result: Result


def bytes_per_token(family: Iterable[ESM2]) -> int:
    """A rough upper bound of what a forward pass without gradients takes, weights apart.

    Of the widest layer: residual stream, its normalised copy, heads, feed-forward block; of the chain: each
    raw embedding, in float64 too where moments are summed, and nested ones packed, padded and averaged.
    """
    members = list(family)
    element = members[-1].dtype.itemsize
    widths = [member.embed_dim for member in members]
    return (12 + 14 * element) * max(widths) + 20 * sum(widths) + 28 * max(widths)


def find_budget(family: Iterable[ESM2], device: torch.device) -> int:
    """Tokens a batch may hold on the device as it is now: what half of its free memory takes.

    Never fewer than 1,024, never more than the device gains from (8,192; 32,768 on CUDA).
    """
    most = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    free = hardware.free_bytes(device)
    if free is None:
        return most
    return max(LEAST_TOKENS, min(most, int(SHARE_OF_FREE * free) // bytes_per_token(family)))


def plan_batches(family: Iterable[ESM2], tokens_per_batch: int | None) -> tuple[int, torch.device]:
    """The budget, found where none is given, and the family's device; warns of a dtype it emulates."""
    members = list(family)
    device = members[0].device
    hardware.warn_if_emulated(device, members[0].dtype)
    if tokens_per_batch is None:
        tokens_per_batch = find_budget(members, device)
    return tokens_per_batch, device


def require_memory(family: Iterable[ESM2], tokens: Tensor) -> None:
    """Raises a MemoryError for tokens that would take more than there is, where the system kills for that."""
    if tokens.device.type != "cpu":
        return
    needed, free = bytes_per_token(family) * tokens.numel(), hardware.free_bytes(tokens.device) or 0
    if needed > free:
        raise MemoryError(f"about {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def run_batches(
    compute: Callable[[Tensor], Result],
    sequences: Iterable[str],
    tokens_per_batch: int,
    device: torch.device,
    *,
    failures: dict[int, str] | None = None,
) -> Iterator[Batch[Result]]:
    """Computes normalised sequences batch by batch, longest first within a window.

    A batch that the device has no memory for is halved, and so is the budget from there on, with a
    warning. On a CPU this needs an operating system that refuses memory rather than kill.

    Args:
        compute: `(batch, time)` tokens to whatever is wanted of them.
        sequences: letters, residues only; read as they are needed.
        tokens_per_batch: tokens a batch holds at most, padding counted; a longer sequence goes alone.
        device: where tokens go.
        failures: if given, receives the number of a sequence that alone takes more memory than there is,
            and why; the others go on.

    Raises:
        ValueError: for a budget below 1.
        MemoryError: where one sequence alone takes more than there is, without `failures`.
    """
    limit = tokens_per_batch
    for batch in cut_batches(sequences, tokens_per_batch):
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            size = len(part) * (len(part[0][1]) + SPECIAL_TOKENS)
            if size <= limit or len(part) == 1:
                done = _attempt(compute, part, device)
                if isinstance(done, Batch):
                    yield done
                    continue
                if len(part) == 1:
                    error = _too_long(size, device, done)
                    if failures is None:
                        raise error
                    failures[part[0][0]] = str(error)
                    continue
                limit = _halved(size, device)
            half = (len(part) + 1) // 2
            waiting += [part[half:], part[:half]]


def _attempt(
    compute: Callable[[Tensor], Result], part: list[tuple[int, str]], device: torch.device
) -> Batch[Result] | str:
    """The batch computed, or what was said when memory ran out."""
    try:
        tokens = tokenize([sequence for _, sequence in part]).to(device)
        return Batch([index for index, _ in part], compute(tokens))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return str(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the system had no memory left."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or str(error) in _SHORT_OF_MEMORY


def _too_long(size: int, device: torch.device, said: str) -> MemoryError:
    """What is said of one sequence that memory has no room for."""
    return MemoryError(
        f"expected memory for one sequence of {size - SPECIAL_TOKENS:,} residues, got none left on "
        f"{device}: cut it (--max-length), take a shorter width or a half-precision model ({said})"
    )


def _halved(size: int, device: torch.device) -> int:
    """Half the tokens that were too many, with a warning."""
    warnings.warn(
        f"{size:,} tokens were too many for the memory of {device}: batches hold at most {size // 2:,} "
        "from here on",
        stacklevel=4,
    )
    return size // 2
