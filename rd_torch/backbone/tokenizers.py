"""`TokenizerAlphabet`: a tokenizer of transformers' in the place of an alphabet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, NamedTuple

from rd_torch.alphabet import GAPS, Alphabet
from rd_torch.letters import DNA, PROTEIN, RNA, Kind
from rd_torch.modules import digest_of

PROBES: Final = {PROTEIN: PROTEIN.letters[:20], DNA: "ACGTTGCAAGCT", RNA: "ACGUUGCAAGCU"}
"""By kind of sequence, letters on which it is tried how a tokenizer wants to be given them."""

BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
"""How tokenizers spell the bytes of a letter that they do not know."""

MARKS: Final = re.compile(r"^(\u2581|\u0120|##)|</w>$")
"""How tokenizers mark where a word begins, goes on or ends."""


class Spelling(NamedTuple):
    """How letters are given to a tokenizer.

    Attributes:
        kind: kind of sequence whose letters the tokenizer knows.
        between: what stands between two letters: nothing or a space.
    """

    kind: Kind
    between: str


class TokenizerAlphabet(Alphabet):
    """A tokenizer of transformers', with the attributes and methods that a chain asks an alphabet for.

    It is tried out whether the tokenizer knows the letters of proteins, of DNA or of RNA, and whether it
    wants spaces between them. Every token that is neither special nor without letters counts as a residue,
    and so does the one for unknown letters. A letter of which the tokenizer makes no token, or several,
    becomes X in proteins and N in nucleic acids, unless it makes several of each letter.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        is_per_letter: whether each letter becomes one token.

    Raises:
        ValueError: for a tokenizer that knows the letters of neither proteins nor nucleic acids, that loses
            letters, that puts several tokens before or after a sequence, or that has no token for padding
            which stands in no sequence.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._take_tokens()
        choices = [Spelling(kind, between) for kind in PROBES for between in ("", " ")]
        self._spelling = min(choices, key=self._count_unknown)
        self.kind = self._spelling.kind
        if self._count_unknown(self._spelling) > 0:
            raise ValueError(
                "expected a tokenizer that knows the letters of proteins or of nucleic acids, got "
                f"{self._name}, which does not"
            )
        self._replaced = str.maketrans(dict.fromkeys(self._find_odd_letters(), self.kind.unknown))
        self._take_surroundings()
        every = "".join(letter + letter for letter in self.kind.letters) + self.kind.letters[::-1]
        around = self.prepend_bos + self.append_eos
        self.is_per_letter = len(self.ids_of(every)) == len(every) + around and not self._joins_letters
        self._take_residues()

    def _take_tokens(self) -> None:
        """Take the tokens and their ids from the tokenizer."""
        vocabulary = self.tokenizer.get_vocab()
        names = {index: token for token, index in vocabulary.items()}
        self.tok_to_idx = dict(vocabulary)
        self.all_toks = [names.get(index, "") for index in range(max(names) + 1)]
        special = [str(token) for token in self.tokenizer.all_special_tokens]
        self.all_special_tokens = [token for token in special if token in vocabulary]
        self.unique_no_split_tokens = self.all_special_tokens
        self.standard_toks = [token for token in self.all_toks if token not in self.all_special_tokens]
        self.prepend_toks, self.append_toks = self.all_special_tokens, []
        self.padding_idx = self.tokenizer.pad_token_id
        self.unk_idx, self.mask_idx = self.tokenizer.unk_token_id, self.tokenizer.mask_token_id
        self._bytes = {index for token, index in vocabulary.items() if BYTE.fullmatch(token)}

    def _count_unknown(self, spelling: Spelling) -> int:
        """Return how many tokens of a probe stand for something unknown, and how many letters are lost."""
        ids = self._encode(PROBES[spelling.kind], spelling.between)
        unknown = sum(each == self.unk_idx or each in self._bytes for each in ids)
        lost = sum(self._encode(letter) in ([], [self.padding_idx]) for letter in PROBES[spelling.kind])
        return unknown + lost if ids else len(PROBES[spelling.kind])

    def _find_odd_letters(self) -> set[str]:
        """Find the letters of which the tokenizer makes no token of their own.

        Raises:
            ValueError: where letters are lost, and the one for unknown letters is among them.
        """
        between, kind = self._spelling.between, self.kind
        odd, lost = set(), set()
        for letter in kind.letters:
            ids = [index for index in self._encode(letter) if index != self.padding_idx]  # which would vanish
            # Some tokenizers make one token of several unknown letters in a row.
            fuses = self.unk_idx in ids and len(self._encode(letter + letter, between)) != 2
            if len(ids) != 1 or fuses:
                odd.add(letter)
            if not ids:
                lost.add(letter)
        if kind.unknown not in odd:
            return odd
        if lost:
            raise ValueError(
                f"expected a tokenizer with a token for each letter, or for {kind.unknown}, got "
                f"{self._name}, which loses {', '.join(sorted(lost))}"
            )
        return set()

    def _take_surroundings(self) -> None:
        """Find the special tokens that the tokenizer puts around a sequence, and the one for padding."""
        probe = PROBES[self.kind]
        whole, inner = self.ids_of(probe), self._encode(probe, self._spelling.between)
        starts = [start for start in range(len(whole)) if whole[start : start + len(inner)] == inner]
        before, after = (whole[: starts[0]], whole[starts[0] + len(inner) :]) if starts else (whole, whole)
        if len(before) > 1 or len(after) > 1:
            raise ValueError(
                "expected a tokenizer that puts at most one token before a sequence and one after it, got "
                f"{self._name}, which makes {whole} of {inner}"
            )
        if self.padding_idx is None or self.padding_idx in whole:
            raise ValueError(
                "expected a tokenizer with a token for padding that stands in no sequence, got "
                f"{self._name} without one: set its pad_token"
            )
        self.prepend_bos, self.append_eos = bool(before), bool(after)
        self.cls_idx = before[0] if before else self.tokenizer.cls_token_id
        self.eos_idx = after[0] if after else self.tokenizer.eos_token_id
        self._around = {*before, *after, self.padding_idx, self.cls_idx, self.eos_idx, self.mask_idx}

    def _take_residues(self) -> None:
        """Say which ids stand for residues, and for gaps in alignments."""
        for own in (Alphabet(), Alphabet(chain_break=True)):
            if self.all_toks == own.all_toks:
                self.residue_ranges, self.gaps = own.residue_ranges, own.gaps
                return
        special = {self.tok_to_idx[token] for token in self.all_special_tokens} - {self.unk_idx}
        others = special | self._around | {
            index for index, token in enumerate(self.all_toks)
            if not re.search(r"[^\W_]", MARKS.sub("", token))
        }  # fmt: skip
        residues = [index for index in range(len(self)) if index == self.unk_idx or index not in others]
        self.residue_ranges = tuple(_runs(each for each in residues if each not in self._around))
        known = (gap for gap in GAPS if len(ids := self._encode(gap)) == 1 and ids[0] != self.unk_idx)
        self.gaps = "".join(known)

    @property
    def _name(self) -> str:
        return type(self.tokenizer).__name__

    @property
    def _joins_letters(self) -> bool:
        """Whether some token is made of several letters, where no spaces keep letters apart."""
        letters = set(self.kind.letters)
        return not self._spelling.between and any(
            len(bare) > 1 and letters.issuperset(bare)
            for bare in (MARKS.sub("", token) for token in self.standard_toks)
        )

    @cached_property
    def digest(self) -> str:
        """Digest of the tokens, their ids, and what the tokenizer makes of some sequences."""
        made = [self.ids_of(each) for each in ("", *PROBES.values(), *self.kind.letters)]
        return digest_of((self.all_toks, made, self.residue_ranges), {})

    @property
    def spelled(self) -> re.Pattern[str]:
        """Expression that finds special tokens in a string."""
        return re.compile("|".join(map(re.escape, self.all_special_tokens)).join("()"))

    def _encode(self, letters: str, between: str = "") -> list[int]:
        """Return the ids of letters, without special tokens around them."""
        text = between.join(letters)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def ids_of(self, residues: str) -> list[int]:
        """Return the ids of a sequence, with the special tokens that the tokenizer puts around it.

        Args:
            residues: the sequence, letters and nothing else.

        Returns:
            The ids.
        """
        text = self._spelling.between.join(residues.translate(self._replaced))
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def tokenize(self, text: str, **_: object) -> list[str]:
        """Split a string into tokens; arguments and errors are those of `encode`."""
        return [self.all_toks[index] for index in self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a string's tokens, without special tokens around them.

        Args:
            text: capital letters of residues, and special tokens, such as `<mask>`, as the tokenizer spells
                them.

        Returns:
            The ids.

        Raises:
            KeyError: with the first piece that is neither.
        """
        ids: list[int] = []
        known = {*self.kind.letters, *self.gaps}
        for piece in filter(None, self.spelled.split(text)):
            if piece in self.all_special_tokens:
                ids.append(self.tok_to_idx[piece])
            elif known.issuperset(piece):
                ids += self._encode(piece.translate(self._replaced), self._spelling.between)
            else:
                raise KeyError(piece)
        return ids


def _runs(numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of neighbours among rising numbers."""
    run: list[int] = []
    for number in numbers:
        if run and number > run[-1] + 1:
            yield run[0], run[-1]
            run = []
        run = [*run[:1], number]
    if run:
        yield run[0], run[-1]
