"""The 33 tokens of ESM-2 and the converter of strings to token ids, called as fair-esm's are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from rd_torch.letters import BLANKS, RESIDUE_LETTERS, Corrections, read_residues

if TYPE_CHECKING:
    from torch import Tensor

_BEFORE: Final = ("<cls>", "<pad>", "<eos>", "<unk>")
_GAPS: Final = ".-"
_STANDARD: Final = RESIDUE_LETTERS + _GAPS
_AFTER: Final = ("<null_1>", "<mask>")
_NAMES: Final = ("ESM-1b", "roberta_large")
_SPELLED: Final = re.compile("|".join(map(re.escape, (*_BEFORE, *_AFTER))).join("()"))

Batch: TypeAlias = tuple[list[str], list[str], "Tensor"]


class Alphabet:
    """ESM-2's alphabet: 33 tokens, the same in every size, with fair-esm's attributes and methods.

    Attributes:
        standard_toks: letters, `.` and `-`: what stands in sequences and alignments.
        prepend_toks: tokens before those in the order of ids.
        append_toks: tokens after them and after the filling `<null_1>`.
        all_toks: all tokens in the order of their ids.
        unique_no_split_tokens: the same list: what `tokenize` looks for.
        tok_to_idx: ids by token.
        all_special_tokens: tokens that stand for no residue and no gap.
        prepend_bos: whether the batch converter sets `<cls>` before a sequence.
        append_eos: whether it sets `<eos>` behind.
        use_msa: whether it reads alignments, which ESM-2 does not.
        cls_idx: id of `<cls>`, 0; `padding_idx`, `eos_idx`, `unk_idx` and `mask_idx` are alike.
    """

    def __init__(self) -> None:
        self.standard_toks = list(_STANDARD)
        self.prepend_toks = list(_BEFORE)
        self.append_toks = list(_AFTER[1:])
        self.prepend_bos = True
        self.append_eos = True
        self.use_msa = False
        self.all_toks = [*_BEFORE, *_STANDARD, *_AFTER]
        self.unique_no_split_tokens = self.all_toks
        self.tok_to_idx = {token: index for index, token in enumerate(self.all_toks)}
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.cls_idx, self.padding_idx, self.eos_idx, self.unk_idx = range(len(_BEFORE))
        self.mask_idx = self.tok_to_idx["<mask>"]

    def __len__(self) -> int:
        return len(self.all_toks)

    def get_idx(self, tok: str) -> int:
        """The id of a token; that of `<unk>` for what is none."""
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        """The token of an id.

        Raises:
            IndexError: for an id beyond the last.
        """
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        """A copy of the ids by token."""
        return self.tok_to_idx.copy()

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> BatchConverter:
        """A function of labelled strings to token ids, which cuts sequences that are longer than told."""
        return BatchConverter(self, truncation_seq_length)

    @classmethod
    def from_architecture(cls, name: str) -> Self:
        """The alphabet of an architecture by fair-esm's name for it, `"ESM-1b"` or `"roberta_large"`.

        Raises:
            ValueError: for an architecture with another alphabet than ESM-2's.
        """
        if name not in _NAMES:
            raise ValueError(
                f"expected an architecture with ESM-2's alphabet, {' or '.join(_NAMES)}, got {name!r}: "
                "only that alphabet is here"
            )
        return cls()

    def tokenize(self, text: str, **_: object) -> list[str]:
        """The tokens of a string, `<mask>` and its like as one each; whitespace parts and is dropped.

        What lies between two tokens and is none, such as a run of lower-case letters, comes as one piece.
        No token lies within another, so that it does not matter which of them is looked for first.
        """
        for token in self.unique_no_split_tokens:
            text = text.replace(token, f" {token} ")
        return text.split()

    def encode(self, text: str) -> list[int]:
        """The ids of a string's tokens, none for an empty one; neither `<cls>` nor `<eos>` is added.

        Raises:
            KeyError: with the first piece that is no token.
        """
        return [self.tok_to_idx[token] for token in self.tokenize(text)]


class BatchConverter:
    """Labelled strings in, token ids out: a function, and a `collate_fn` of a `DataLoader`.

    What fair-esm's converter reads is read as it does, `-`, `.` and spelled tokens such as `<mask>` as tokens
    of their own. Letters at which it fails with a KeyError are read as everywhere in this package: lower case
    as upper, a `*` at the end as none, and letters that are no residue as X, with one warning that counts
    them.

    Args:
        alphabet: whose ids are given, and which says whether `<cls>` and `<eos>` are set.
        truncation_seq_length: tokens of a sequence that are kept, `<cls>` and `<eos>` not counted; all
            for None or 0.
    """

    def __init__(self, alphabet: Alphabet, truncation_seq_length: int | None = None) -> None:
        self.alphabet = alphabet
        self.truncation_seq_length = truncation_seq_length

    def __call__(self, raw_batch: Sequence[tuple[str, str]]) -> Batch:
        """Labels and strings as they came, and `(batch, time)` int64 ids with `<pad>` at the right.

        Args:
            raw_batch: pairs of a label and a string; a string may be empty, the batch may not.

        Raises:
            ValueError: for an empty batch, items that are no pairs, or a string that is no sequence, with
                its number, from 1, and the first character that does not belong.
        """
        import torch  # here, so that facts and choices of a model are there without waiting for torch

        rows = len(raw_batch)
        if isinstance(raw_batch, str | Mapping) or any(isinstance(pair, str) for pair in raw_batch):
            raise ValueError(
                f"expected pairs of label and sequence, got {type(raw_batch).__name__} of strings: pass "
                "[(label, sequence), ...]"
            )
        columns = list(zip(*raw_batch, strict=False))
        if len(columns) != 2:
            raise ValueError(
                f"expected at least one pair of label and sequence, got {rows} items of {len(columns)} parts"
            )
        labels, strings = map(list, columns)
        alphabet, kept = self.alphabet, slice(self.truncation_seq_length or None)
        start = [alphabet.cls_idx] if alphabet.prepend_bos else []
        end = [alphabet.eos_idx] if alphabet.append_eos else []
        corrections = Corrections()
        encoded = [
            [*start, *self._ids(number, string, corrections)[kept], *end]
            for number, string in enumerate(strings, start=1)
        ]
        corrections.warn()
        tokens = torch.full((rows, max(map(len, encoded))), alphabet.padding_idx)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return labels, strings, tokens

    def _ids(self, number: int, string: str, corrections: Corrections) -> list[int]:
        """The ids of one string of a batch."""
        try:
            return self.alphabet.encode(string)
        except KeyError:  # where fair-esm ends
            parts = [part for part in _SPELLED.split(str(string)) if part.strip(BLANKS)]
        try:
            read = [
                part if _SPELLED.match(part) else read_residues(part, corrections, gaps=_GAPS)
                for part in parts
            ]
        except ValueError as error:
            raise ValueError(f"{error} of string number {number:,}") from None
        return self.alphabet.encode("".join(read))
