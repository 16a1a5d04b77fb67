"""`TokenizerAlphabet`: a tokenizer of transformers' in the place of an alphabet."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Final

from rd_torch.alphabet import Alphabet
from rd_torch.letters import RESIDUE_LETTERS

PROBES: Final = (RESIDUE_LETTERS[:20], "ACGTTGCAAGCT", "ACGUUGCAAGCU")
"""Letters of proteins, of DNA and of RNA, on which it is tried how a tokenizer wants to be given letters."""


class TokenizerAlphabet(Alphabet):
    """A tokenizer of transformers', with the attributes that a chain asks an alphabet for.

    Some tokenizers want letters with spaces between them and others without, which is found out by trying.
    Every token that is not special counts as a residue, and so does the one for unknown letters.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        is_per_letter: whether each letter becomes one token.

    Raises:
        ValueError: for a tokenizer that knows neither the letters of proteins nor those of nucleic acids, or
            that has no token of its own for padding.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._between = min(
            ("", " "), key=lambda between: min(self._unknown(each, between) for each in PROBES)
        )
        probe = min(PROBES, key=lambda each: self._unknown(each, self._between))
        name = type(tokenizer).__name__
        if self._unknown(probe, self._between) > 0:
            raise ValueError(
                "expected a tokenizer that knows the letters of proteins or of nucleic acids, got "
                f"{name}, which does not"
            )
        ids = self.ids_of(probe)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ids:
            raise ValueError(f"expected a tokenizer with a token for padding alone, got {name} without one")
        self._take_tokens()
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.prepend_bos, self.append_eos = ids[0] in special, ids[-1] in special
        self.cls_idx = ids[0] if self.prepend_bos else tokenizer.cls_token_id
        self.eos_idx = ids[-1] if self.append_eos else tokenizer.eos_token_id
        self.is_per_letter = len(ids) == len(probe) + self.prepend_bos + self.append_eos
        runs = pairwise(sorted({-1, *special, len(self)}))
        self.residue_ranges = tuple((one + 1, two - 1) for one, two in runs if two - one > 1)

    def _take_tokens(self) -> None:
        """Take the tokens and their ids from the tokenizer."""
        vocabulary = self.tokenizer.get_vocab()
        names = {index: token for token, index in vocabulary.items()}
        self.tok_to_idx = dict(vocabulary)
        self.all_toks = [names.get(index, "") for index in range(max(names) + 1)]
        self.unique_no_split_tokens = self.all_special_tokens = list(self.tokenizer.all_special_tokens)
        self.standard_toks = [token for token in self.all_toks if token not in self.all_special_tokens]
        self.prepend_toks, self.append_toks = self.all_special_tokens, []
        self.padding_idx = self.tokenizer.pad_token_id
        self.unk_idx, self.mask_idx = self.tokenizer.unk_token_id, self.tokenizer.mask_token_id

    @property
    def spelled(self) -> re.Pattern[str]:
        """Expression that finds special tokens in a string."""
        return re.compile("|".join(map(re.escape, self.all_special_tokens)).join("()"))

    def _unknown(self, letters: str, between: str) -> float:
        """Return the share of tokens of these letters that stand for something unknown."""
        ids = self._ids_of_letters(letters, between)
        return ids.count(self.tokenizer.unk_token_id) / len(ids) if ids else 1.0

    def _ids_of_letters(self, letters: str, between: str) -> list[int]:
        text = between.join(letters)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def ids_of(self, residues: str) -> list[int]:
        """Return the ids of a sequence, with the special tokens that the tokenizer puts around it.

        Args:
            residues: the sequence, letters and nothing else.
        """
        return list(self.tokenizer(self._between.join(residues), verbose=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a string's tokens, without special tokens around them.

        Args:
            text: capital letters, and special tokens such as `<mask>` as the tokenizer spells them.

        Returns:
            The ids.

        Raises:
            KeyError: with the first piece that is neither.
        """
        ids: list[int] = []
        for piece in self.spelled.split(text):
            if piece in self.all_special_tokens:
                ids.append(self.tok_to_idx[piece])
            elif piece.isascii() and ((piece.isalpha() and piece.isupper()) or not piece):
                ids += self._ids_of_letters(piece, self._between) if piece else []
            else:
                raise KeyError(piece)
        return ids
