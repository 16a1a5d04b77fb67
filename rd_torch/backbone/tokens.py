"""Make batches of tokens, tell which positions are residues and which are padding, and refuse other tensors.

Tokens are integer ids, `(batch, time)`, or distributions over the alphabet, `(batch, time, 33)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

import torch
from torch import Tensor

from rd_torch.alphabet import Alphabet
from rd_torch.letters import RESIDUE_LETTERS

SUM_TOLERANCE: Final = 5e-3
"""How far the sum of a distribution may be from one; rows of a softmax in bfloat16 are up to 4e-3 off."""

UBIQUITIN: Final = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def tokenize(sequences: Sequence[str], alphabet: Alphabet) -> Tensor:
    """Turn normalised sequences into token ids, as fair-esm's batch converter does.

    Args:
        sequences: residues and nothing else, one letter each.
        alphabet: the alphabet that has the ids.

    Returns:
        `(batch, time)` int64 ids, with special tokens around each sequence, where the alphabet has them, and
        `<pad>` at the right.
    """
    rows = [alphabet.ids_of(sequence) for sequence in sequences]
    length = max(map(len, rows), default=len(alphabet.ids_of("")))
    tokens = torch.full((len(rows), length), alphabet.padding_idx)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def is_residue(ids: Tensor, alphabet: Alphabet) -> Tensor:
    """Return a mask that is True at residues; ESM-2's are amino acids and X, B, U, Z, O, ids 4 to 28."""
    (first, last), *others = alphabet.residue_ranges
    mask = (ids >= first) & (ids <= last)
    for first, last in others:
        mask = mask | ((ids >= first) & (ids <= last))
    return mask


def is_real(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """Return a `(batch, time)` mask that is False at padding: at `<pad>`, or where it has probability 1."""
    if tokens.is_floating_point():
        return tokens[..., alphabet.padding_idx] < 1
    return tokens != alphabet.padding_idx


def token_ids(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """Return `(batch, time)` ids: integer tokens themselves, or the likeliest ids of distributions.

    All residues together compete with each other token. Thus a position counts as a residue where residues
    have most of the probability, though each of them may have less than another token.
    """
    if not tokens.is_floating_point():
        return tokens
    every = torch.arange(tokens.shape[-1], device=tokens.device)
    places = is_residue(every, alphabet)
    residues = tokens.masked_fill(~places, -torch.inf)
    others = tokens.masked_fill(places, -torch.inf)
    together = tokens.masked_fill(~places, 0).sum(-1)
    return torch.where(together >= others.amax(-1), residues.argmax(-1), others.argmax(-1))


def check_tokens(tokens: Tensor, alphabet: Alphabet) -> None:
    """Refuse what is neither token ids nor distributions; values are checked in eager mode only.

    Args:
        tokens: `(batch, time)` int64 or int32 ids, or `(batch, time, 33)` floating distributions.
        alphabet: the alphabet that the ids are of, or that distributions are over.

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
    if soft and (tokens.ndim != 3 or tokens.shape[-1] != len(alphabet)):
        raise ValueError(
            f"expected floating tokens as distributions of shape (batch, time, {len(alphabet)}), "
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
    elif lowest < 0 or highest >= len(alphabet):
        raise ValueError(
            f"expected token ids from 0 to {len(alphabet) - 1}, got {lowest:.0f} to {highest:.0f}"
        )


def find_difference(one: Alphabet, other: Alphabet) -> str | None:
    """Find a sequence that two alphabets turn into different token ids.

    Args:
        one: an alphabet.
        other: an alphabet.

    Returns:
        A sequence of residues, if there is one; else a token that means something else in the other; None
        where the two alphabets are the same.
    """
    if one is other:
        return None
    for sequence in _probes():
        if one.ids_of(sequence) != other.ids_of(sequence):
            return sequence
    pairs = zip_longest(one.all_toks, other.all_toks)
    tokens = [token for pair in pairs if pair[0] != pair[1] for token in pair if token is not None]
    return min(tokens, key=len, default=None)  # a single letter, where there is one, tells most


def _probes() -> Iterator[str]:
    """Yield sequences in which every letter of proteins stands, the shortest first."""
    yield from ("", *RESIDUE_LETTERS, UBIQUITIN, RESIDUE_LETTERS)


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
