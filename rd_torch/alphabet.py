"""The 33 tokens of ESM-2 or of ESM-C, and the converter of strings to ids, called as fair-esm's are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from rd_torch.letters import BLANKS, PROTEIN, RESIDUE_LETTERS, Corrections, Kind, read_residues

if TYPE_CHECKING:
    from torch import Tensor

_BEFORE: Final = ("<cls>", "<pad>", "<eos>", "<unk>")
GAPS: Final = ".-"
"""Characters that stand for gaps in alignments."""

_STANDARD: Final = RESIDUE_LETTERS + GAPS
_NO_TOKEN: Final = "<null_1>"
_MASK: Final = "<mask>"
CHAIN_BREAK: Final = "|"
_NAMES: Final = ("ESM-1b", "roberta_large")

Batch: TypeAlias = tuple[list[str], list[str], "Tensor"]


class Alphabet:
    """The alphabet of a family: 33 tokens, the same in every size, with fair-esm's attributes and methods.

    ESM-2 and ESM-C have the same ids, but for one: 31 fills a place in ESM-2, and is the break between two
    chains, `|`, in ESM-C.

    Args:
        chain_break: whether id 31 is `|`, as in ESM-C.

    Attributes:
        standard_toks: tokens of sequences and alignments: the letters, `.` and `-`.
        prepend_toks: tokens whose ids come before those.
        append_toks: tokens whose ids come after those, without `<null_1>`, which only fills a place.
        all_toks: all tokens in the order of their ids.
        unique_no_split_tokens: the tokens that `tokenize` looks for, which are all of them.
        tok_to_idx: id of each token.
        all_special_tokens: tokens that stand for no residue and no gap.
        prepend_bos: whether the batch converter puts `<cls>` before a sequence.
        append_eos: whether the batch converter puts `<eos>` after a sequence.
        use_msa: whether the batch converter reads alignments; false, because ESM-2 reads none.
        cls_idx: id of `<cls>`, 0; likewise `padding_idx`, `eos_idx`, `unk_idx` and `mask_idx`.
        residue_ranges: first and last id of each run of ids that stand for residues: those of amino acids and
            X, B, U, Z, O.
        kind: what the sequences are of: proteins, unless the alphabet is of a model of nucleic acids.
        gaps: characters for gaps that are tokens.
        is_per_letter: whether each letter of a sequence becomes one token.
    """

    kind: Kind = PROTEIN
    gaps: str = GAPS
    is_per_letter: bool = True
    residue_ranges: tuple[tuple[int, int], ...] = ((len(_BEFORE), len(_BEFORE) + len(RESIDUE_LETTERS) - 1),)

    def __init__(self, chain_break: bool = False) -> None:
        after = (CHAIN_BREAK if chain_break else _NO_TOKEN, _MASK)
        self.standard_toks = list(_STANDARD)
        self.prepend_toks = list(_BEFORE)
        self.append_toks = [token for token in after if token != _NO_TOKEN]
        self.prepend_bos = True
        self.append_eos = True
        self.use_msa = False
        self.all_toks = [*_BEFORE, *_STANDARD, *after]
        self.unique_no_split_tokens = self.all_toks
        self.tok_to_idx = {token: index for index, token in enumerate(self.all_toks)}
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.cls_idx, self.padding_idx, self.eos_idx, self.unk_idx = range(len(_BEFORE))
        self.mask_idx = self.tok_to_idx["<mask>"]

    @property
    def spelled(self) -> re.Pattern[str]:
        """Expression that finds tokens that are no letters and no gaps, such as `<mask>`."""
        spelled = [token for token in self.all_toks if token not in _STANDARD]
        return re.compile("|".join(map(re.escape, spelled)).join("()"))

    def __len__(self) -> int:
        return len(self.all_toks)

    def get_idx(self, tok: str) -> int:
        """Return the id of a token; for a string that is no token, the id of `<unk>`."""
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        """Return the token of an id.

        Args:
            ind: the id, 0 to 32.

        Returns:
            The token.

        Raises:
            IndexError: for an id after the last.
        """
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        """Return a copy of the ids by token."""
        return self.tok_to_idx.copy()

    def ids_of(self, residues: str) -> list[int]:
        """Return the ids of a sequence, with `<cls>` before it and `<eos>` after it.

        Args:
            residues: the sequence, residues and nothing else, one letter each.

        Returns:
            One id for each residue, and two more.

        Raises:
            KeyError: with the first letter that is no token.
        """
        return [self.cls_idx, *map(self.tok_to_idx.__getitem__, residues), self.eos_idx]

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> BatchConverter:
        """Make a function that turns labelled strings into token ids.

        Args:
            truncation_seq_length: number of tokens of a sequence to keep, `<cls>` and `<eos>` not counted; by
                default all.

        Returns:
            The function.
        """
        return BatchConverter(self, truncation_seq_length)

    @classmethod
    def from_architecture(cls, name: str) -> Self:
        """Return the alphabet of an architecture.

        Args:
            name: fair-esm's name of the architecture, `"ESM-1b"` or `"roberta_large"`.

        Returns:
            The alphabet, which is the same for both.

        Raises:
            ValueError: for an architecture with another alphabet than ESM-2's.
        """
        if name not in _NAMES:
            raise ValueError(
                f"expected an architecture with ESM-2's alphabet, {' or '.join(_NAMES)}, got {name!r}: "
                "no other alphabet is here"
            )
        return cls()

    def tokenize(self, text: str, **_: object) -> list[str]:
        """Split a string into tokens, at whitespace too, which is dropped.

        `<mask>` and other spelled tokens are one token each. What is no token, such as a run of lower-case
        letters, stays one piece. No token contains another, so that their order does not matter.

        Args:
            text: the string.
            **_: options of fair-esm's method, which change nothing.

        Returns:
            Tokens, and pieces that are none, in their order.
        """
        for token in self.unique_no_split_tokens:
            text = text.replace(token, f" {token} ")
        return text.split()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a string's tokens, without `<cls>` and `<eos>` around them.

        Args:
            text: the string, which may be empty.

        Returns:
            One id for each token.

        Raises:
            KeyError: with the first piece that is no token.
        """
        return [self.tok_to_idx[token] for token in self.tokenize(text)]


class BatchConverter:
    """A function that turns labelled strings into token ids; it serves as `collate_fn` of a `DataLoader`.

    What fair-esm's converter accepts is read as it reads it: `-`, `.` and spelled tokens such as `<mask>` are
    tokens of their own. Letters at which it fails with a KeyError are read as everywhere in this package:
    lower case becomes upper case, a `*` at the end is dropped, and letters that are no residue become X, with
    one warning that counts them.

    Args:
        alphabet: the alphabet that has the ids, and says whether `<cls>` and `<eos>` are added.
        truncation_seq_length: number of tokens of a sequence to keep, `<cls>` and `<eos>` not counted; None
            or 0 for all.
    """

    def __init__(self, alphabet: Alphabet, truncation_seq_length: int | None = None) -> None:
        self.alphabet = alphabet
        self.truncation_seq_length = truncation_seq_length

    def __call__(self, raw_batch: Sequence[tuple[str, str]]) -> Batch:
        """Turn labelled strings into token ids.

        Args:
            raw_batch: pairs of a label and a string; a string may be empty, the batch may not.

        Returns:
            The labels, the strings as they came, and `(batch, time)` int64 ids with `<pad>` at the right.

        Raises:
            ValueError: for an empty batch, items that are no pairs, or a string that is no sequence, with
                its number, from 1, and the first character that does not belong.
        """
        import torch  # here, so that `rd_torch.RDConfig`, which needs the alphabet, loads without torch

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
        """Return the ids of one string of a batch."""
        alphabet = self.alphabet
        try:
            return alphabet.encode(string)
        except KeyError:  # fair-esm's converter fails here; ours reads as the rest of the package does
            spelled = alphabet.spelled
        parts = [part for part in spelled.split(str(string)) if part.strip(BLANKS)]
        try:
            read = [
                part
                if spelled.match(part)
                else read_residues(part, corrections, gaps=alphabet.gaps, kind=alphabet.kind)
                for part in parts
            ]
        except ValueError as error:
            raise ValueError(f"{error} of string number {number:,}") from None
        return alphabet.encode("".join(read))
