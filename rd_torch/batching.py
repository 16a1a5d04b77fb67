"""Run sequences through a model in batches that fit the free memory, and halve them if it runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.alphabet import Alphabet
from rd_torch.backbone import Backbone, TooManyTokensError, tokenize
from rd_torch.levels import SPECIAL_TOKENS
from rd_torch.sequences import cut_batches

Result = TypeVar("Result")

MOST_TOKENS: Final = {"cpu": 8_192, "cuda": 32_768}
"""Number of tokens in a batch, by type of device, above which a batch only takes more memory.

So many rows keep the matrix products busy. The number for CUDA was chosen without measuring on a GPU.
"""

LEAST_TOKENS: Final = 1_024
"""Number of tokens that a batch may always hold: one of the longest sequences that ESM-2 was trained on.

With less memory free the batch is tried all the same, because the estimate is rough.
"""

SHARE_OF_FREE: Final = 0.5
"""Share of the free memory that a batch is planned to take: the estimate is rough, others allocate too."""

# Messages of oneDNN and C++ when memory runs out; their errors have no type of their own. They are compared
# whole, because oneDNN adds to these words when a shape is at fault.
_SHORT_OF_MEMORY: Final = ("could not create a primitive", "could not execute a primitive", "std::bad_alloc")


class Batch(NamedTuple, Generic[Result]):
    """What was computed of one batch.

    Attributes:
        indices: number of each sequence of the batch in the input, from 0.
        result: what `compute` returned for the batch.
    """

    indices: list[int]
    result: Result


def bytes_per_token(family: Iterable[Backbone], longest: int = 0) -> int:
    """Return a rough upper bound of the bytes that a forward pass without gradients takes for each token.

    In the widest layer it counts the residual stream, its normalised copy, the heads and the feed-forward
    block; in the chain every raw embedding, also in float64 for moments, and the nested one packed, padded
    and averaged. It does not count weights.

    Args:
        family: the backbones.
        longest: number of tokens in the longest sequence, on which it depends where whole attention maps are
            in memory.
    """
    members = list(family)
    element = members[-1].dtype.itemsize
    widths = [member.embed_dim for member in members]
    beyond = max(member.bytes_beyond(longest) for member in members)
    return (12 + 14 * element) * max(widths) + 20 * sum(widths) + 28 * max(widths) + beyond


def find_budget(family: Iterable[Backbone], device: torch.device) -> int:
    """Find how many tokens a batch may hold: as many as half of the memory takes that is free now.

    Args:
        family: the backbones.
        device: the device that they are on.

    Returns:
        The number of tokens: at least 1,024, and at most 8,192 or, on CUDA, 32,768.
    """
    most = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    free = hardware.free_bytes(device)
    if free is None:
        return most
    members, room = list(family), int(SHARE_OF_FREE * free)
    tokens = min(most, room // bytes_per_token(members))
    while tokens > LEAST_TOKENS and tokens * bytes_per_token(members, tokens) > room:
        tokens -= tokens // 16  # one sequence may fill the batch, and its attention maps grow with its square
    return max(LEAST_TOKENS, tokens)


def plan_batches(family: Iterable[Backbone], tokens_per_batch: int | None) -> tuple[int, torch.device]:
    """Settle how large batches are and where they go; warn if the device emulates the backbones' dtype.

    Args:
        family: the backbones.
        tokens_per_batch: number of tokens that a batch may hold; None to find it from the free memory.

    Returns:
        The number of tokens, and the backbones' device.
    """
    members = list(family)
    device = members[0].device
    hardware.warn_if_emulated(device, members[0].dtype)
    if tokens_per_batch is None:
        tokens_per_batch = find_budget(members, device)
    return tokens_per_batch, device


def require_memory(family: Iterable[Backbone], tokens: Tensor) -> None:
    """Require that a CPU has the memory that these tokens are estimated to take.

    Raises:
        MemoryError: if it has not. A system that grants more memory than it has would kill the process.
    """
    if tokens.device.type != "cpu":
        return  # a GPU refuses by itself
    needed = bytes_per_token(family, tokens.shape[1]) * tokens.numel()
    free = hardware.free_bytes(tokens.device) or 0
    if needed > free:
        raise MemoryError(f"about {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def run_batches(
    compute: Callable[[Tensor], Result],
    sequences: Iterable[str],
    alphabet: Alphabet,
    tokens_per_batch: int,
    device: torch.device,
    *,
    failures: dict[int, str] | None = None,
) -> Iterator[Batch[Result]]:
    """Call a function on sequences, batch by batch.

    Sequences are sorted by length within a window of about 16 batches, so that little is padded. A batch for
    which memory runs out is halved, and so is the budget from then on, with a warning. On a CPU this needs an
    operating system that refuses memory, instead of killing the process.

    Args:
        compute: the function; it takes `(batch, time)` token ids.
        sequences: residues alone, one letter each; they are read as they are needed.
        alphabet: alphabet that turns sequences into token ids.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; a longer sequence
            makes a batch of its own.
        device: device to put the tokens on.
        failures: if given, a sequence that alone takes more memory than there is, or that has more tokens
            than a backbone takes, does not end the run; its number and the reason are added here.

    Yields:
        The result of each batch.

    Raises:
        ValueError: for a budget below 1.
        MemoryError: without `failures`, for a sequence that alone takes more memory than there is.
        TooManyTokensError: without `failures`, for a sequence that has more tokens than a backbone takes.
    """
    limit = tokens_per_batch
    for batch in cut_batches(sequences, tokens_per_batch):
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            size = len(part) * (len(part[0][1]) + SPECIAL_TOKENS)
            if size <= limit or len(part) == 1:
                done = _attempt(compute, part, alphabet, device)
                if isinstance(done, Batch):
                    yield done
                    continue
                if failures is None and (len(part) == 1 or isinstance(done, TooManyTokensError)):
                    raise done
                if failures is not None and len(part) == 1:
                    failures[part[0][0]] = str(done)
                    continue
                if isinstance(done, MemoryError):
                    limit = _halve(size, device)
            half = (len(part) + 1) // 2
            waiting += [part[half:], part[:half]]  # popped from the end: the first half comes first


def _attempt(
    compute: Callable[[Tensor], Result], part: list[tuple[int, str]], alphabet: Alphabet, device: torch.device
) -> Batch[Result] | MemoryError | TooManyTokensError:
    """Return what was computed of a batch, or why it cannot be."""
    try:
        tokens = tokenize([sequence for _, sequence in part], alphabet).to(device)
        return Batch([index for index, _ in part], compute(tokens))
    except TooManyTokensError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return MemoryError(_too_long_message(len(part[0][1]), device, str(error)))


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a device or the system has no memory left."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or str(error) in _SHORT_OF_MEMORY


def _too_long_message(residues: int, device: torch.device, reason: str) -> str:
    """Return the message for one sequence that memory has no room for."""
    return (
        f"expected memory for one sequence of {residues:,} residues, got none left on "
        f"{device}: cut the sequence (--max-length), or take a smaller width or a half-precision model "
        f"({reason})"
    )


def _halve(size: int, device: torch.device) -> int:
    """Return half as many tokens as were too many, and warn."""
    warnings.warn(
        f"{size:,} tokens were too many for the memory of {device}: batches hold at most {size // 2:,} "
        "from now on",
        stacklevel=4,
    )
    return size // 2
