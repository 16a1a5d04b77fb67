"""Make batches of tokens, tell which positions are residues and which are padding, and refuse other tensors.

Tokens are integer ids, `(batch, time)`, or distributions over the alphabet, `(batch, time, 33)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from rd_torch.config import ALPHABET, FIRST_RESIDUE, LAST_RESIDUE, SPECIAL_TOKENS

SUM_TOLERANCE: Final = 5e-3
"""How far the sum of a distribution may be from one; rows of a softmax in bfloat16 are up to 4e-3 off."""


def tokenize(sequences: Sequence[str]) -> Tensor:
    """Turn normalised sequences into token ids, as fair-esm's batch converter does.

    Args:
        sequences: residues and nothing else, one letter each.

    Returns:
        `(batch, time)` int64 ids, with `<cls>` and `<eos>` around each sequence and `<pad>` at the right.
    """
    length = max((len(sequence) for sequence in sequences), default=0) + SPECIAL_TOKENS
    tokens = torch.full((len(sequences), length), ALPHABET.padding_idx)
    for row, sequence in zip(tokens, sequences, strict=True):
        ids = [ALPHABET.cls_idx, *map(ALPHABET.tok_to_idx.__getitem__, sequence), ALPHABET.eos_idx]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def is_residue(ids: Tensor) -> Tensor:
    """Return a mask that is True at amino acids and X, B, U, Z, O, which are ids 4 to 28."""
    return (ids >= FIRST_RESIDUE) & (ids <= LAST_RESIDUE)


def is_real(tokens: Tensor) -> Tensor:
    """Return a `(batch, time)` mask that is False at padding: at id 1, or where `<pad>` has probability 1."""
    if tokens.is_floating_point():
        return tokens[..., ALPHABET.padding_idx] < 1
    return tokens != ALPHABET.padding_idx


def token_ids(tokens: Tensor) -> Tensor:
    """Return `(batch, time)` ids: integer tokens themselves, or the likeliest ids of distributions.

    All residues together compete with each other token. Thus a position counts as a residue where residues
    have most of the probability, though each of them may have less than another token.
    """
    if not tokens.is_floating_point():
        return tokens
    residues = tokens[..., FIRST_RESIDUE : LAST_RESIDUE + 1]
    together = tokens.clone()
    together[..., FIRST_RESIDUE : LAST_RESIDUE + 1] = 0
    together[..., FIRST_RESIDUE] = residues.sum(-1)
    winner = together.argmax(-1)
    return torch.where(winner == FIRST_RESIDUE, FIRST_RESIDUE + residues.argmax(-1), winner)


def check_tokens(tokens: Tensor) -> None:
    """Refuse what is neither token ids nor distributions; values are checked in eager mode only.

    Args:
        tokens: `(batch, time)` int64 or int32 ids, or `(batch, time, 33)` floating distributions.

    Raises:
        TypeError: for another dtype, or no tensor.
        ValueError: for another shape, unknown ids, or rows that are no distribution.
    """
    soft = isinstance(tokens, Tensor) and tokens.is_floating_point()
    if not soft and (not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32)):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"expected tokens as an int64 or int32 tensor, or distributions as a floating one, got {got}: "
            "use a batch converter, or convert ids with .long()"
        )
    if soft and (tokens.ndim != 3 or tokens.shape[-1] != len(ALPHABET)):
        raise ValueError(
            f"expected floating tokens as distributions of shape (batch, time, {len(ALPHABET)}), "
            f"got {tuple(tokens.shape)}: convert token ids with .long()"
        )
    if not soft and tokens.ndim != 2:
        raise ValueError(
            f"expected tokens of shape (batch, time), got {tuple(tokens.shape)}: "
            "give a single row a batch with .unsqueeze(0)"
        )
    if torch.compiler.is_compiling() or not tokens.numel():
        return
    lowest, highest = (float(bound) for bound in tokens.detach().aminmax())
    if soft:
        _check_sums(tokens.detach(), lowest)
    elif lowest < 0 or highest >= len(ALPHABET):
        raise ValueError(
            f"expected token ids from 0 to {len(ALPHABET) - 1}, got {lowest:.0f} to {highest:.0f}"
        )


def _check_sums(distributions: Tensor, lowest: float) -> None:
    """Raise a ValueError unless rows sum to one and nothing is negative, both within `SUM_TOLERANCE`."""
    sums = distributions.sum(-1, dtype=torch.float64)
    worst = (sums - 1).abs().max().item()
    if not (worst <= SUM_TOLERANCE and lowest >= -SUM_TOLERANCE):
        raise ValueError(
            f"expected distributions whose rows sum to 1 within {SUM_TOLERANCE} and have no negative entry, "
            f"got sums that are off by up to {worst:.3g} and entries from {lowest:.3g}: "
            "turn logits into distributions with .softmax(-1), and give padding probability 1 at <pad>"
        )
