"""What stands where in a batch of tokens: residues, padding, likeliest ids; whether it is one at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from rd_torch.config import ALPHABET, FIRST_RESIDUE, LAST_RESIDUE, SPECIAL_TOKENS

SUM_TOLERANCE: Final = 5e-3
"""How far a distribution may sum from one: softmax in bfloat16 comes to 4e-3."""


def tokenize(sequences: Sequence[str]) -> Tensor:
    """`(batch, time)` token ids of normalised sequences, `<cls>` and `<eos>` around each, padded.

    Equal to fair-esm's batch converter on sequences of single letters.
    """
    length = max((len(sequence) for sequence in sequences), default=0) + SPECIAL_TOKENS
    tokens = torch.full((len(sequences), length), ALPHABET.padding_idx)
    for row, sequence in zip(tokens, sequences, strict=True):
        ids = [ALPHABET.cls_idx, *map(ALPHABET.tok_to_idx.__getitem__, sequence), ALPHABET.eos_idx]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def is_residue(ids: Tensor) -> Tensor:
    """True at amino acids and X, B, U, Z, O: ids 4 to 28."""
    return (ids >= FIRST_RESIDUE) & (ids <= LAST_RESIDUE)


def is_real(tokens: Tensor) -> Tensor:
    """`(batch, time)` False at padding: id 1, or a distribution that is all `<pad>`."""
    if tokens.is_floating_point():
        return tokens[..., ALPHABET.padding_idx] < 1
    return tokens != ALPHABET.padding_idx


def token_ids(tokens: Tensor) -> Tensor:
    """`(batch, time)` ids: integer tokens themselves, of distributions the likeliest.

    All residues together compete with each other token, so that a position is a residue where residues
    have most of it.
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
    """Raises unless `tokens` is `(batch, time)` of integer ids, or `(batch, time, 33)` of distributions.

    Values are looked at in eager mode only.

    Raises:
        TypeError: for another dtype, or no tensor.
        ValueError: for another shape, unknown ids, or rows that are no distribution.
    """
    soft = isinstance(tokens, Tensor) and tokens.is_floating_point()
    if not soft and (not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32)):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"expected tokens as an int64 or int32 tensor, or distributions as a floating one, got {got}: "
            "use a batch converter, or .long()"
        )
    if soft and (tokens.ndim != 3 or tokens.shape[-1] != len(ALPHABET)):
        raise ValueError(
            f"expected floating tokens as distributions of shape (batch, time, {len(ALPHABET)}), "
            f"got {tuple(tokens.shape)}: token ids want .long()"
        )
    if not soft and tokens.ndim != 2:
        raise ValueError(
            f"expected tokens of shape (batch, time), got {tuple(tokens.shape)}: unsqueeze(0) a single row"
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
    """Raises unless rows sum to one and nothing is negative, both within `SUM_TOLERANCE`."""
    sums = distributions.sum(-1, dtype=torch.float64)
    worst = (sums - 1).abs().max().item()
    if not (worst <= SUM_TOLERANCE and lowest >= -SUM_TOLERANCE):
        raise ValueError(
            f"expected distributions whose rows sum to 1 within {SUM_TOLERANCE} and have no negative entry, "
            f"got sums that are off by up to {worst:.3g} and entries from {lowest:.3g}: "
            "logits want .softmax(-1), and padding 1 at <pad>"
        )
