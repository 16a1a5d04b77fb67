"""`Embedder`: embed sequences batch by batch, whole or in overlapping pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch.alphabet import Alphabet
from rd_torch.backbone import is_residue, obstacle
from rd_torch.batching import require_memory, run_batches
from rd_torch.config import RDConfig
from rd_torch.model import RDModel
from rd_torch.pieces import Blend, Pieces
from rd_torch.pooling import pool_residues, pools_of
from rd_torch.store import Row


class Embedder(NamedTuple):
    """How sequences are embedded.

    Attributes:
        model: the chain.
        pool: ways to pool residues, as `pool_name` joins them.
        width: number of features to keep; None keeps all.
        pieces: how long sequences are cut into pieces; None keeps them whole.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most.
        device: device to put batches on.
    """

    model: RDModel
    pool: str
    width: int | None
    pieces: Pieces | None
    tokens_per_batch: int
    device: torch.device

    def __call__(
        self, sequences: Mapping[int, str], failures: dict[int, str] | None = None
    ) -> Iterator[list[Row]]:
        """Embed sequences.

        Args:
            sequences: sequences by number, residues alone, one letter each.
            failures: if given, a sequence that alone takes more memory than there is, or that has more tokens
                than a backbone takes, does not end the run; its number and the reason are added here.

        Yields:
            The numbers and embeddings of the sequences that a batch completed, in any order.

        Raises:
            MemoryError: without `failures`, for a sequence that alone takes more memory than there is.
            TooManyTokensError: without `failures`, for a sequence that has more tokens than a backbone takes.
        """
        if self.pieces is None:
            yield from self._embed_whole(sequences, self.pool, failures)
            return
        long = {number: letters for number, letters in sequences.items() if len(letters) > self.pieces.length}
        short = {number: letters for number, letters in sequences.items() if number not in long}
        yield from self._embed_whole(short, self.pool, failures)
        yield from self._embed_in_pieces(self.pieces, long, failures)

    def _embed_whole(
        self, sequences: Mapping[int, str], pool: str, failures: dict[int, str] | None
    ) -> Iterator[list[Row]]:
        """Embed sequences that stay whole."""
        numbers, failed = list(sequences), None if failures is None else dict[int, str]()
        compute = batch_embedder(self.model, pool, self.width)
        alphabet = self.model.alphabet
        for batch in run_batches(
            compute, sequences.values(), alphabet, self.tokens_per_batch, self.device, failures=failed
        ):
            yield [(numbers[place], row) for place, row in zip(batch.indices, batch.result, strict=True)]
        if failures is not None and failed:
            failures |= {numbers[place]: why for place, why in failed.items()}

    def _embed_in_pieces(
        self, pieces: Pieces, sequences: Mapping[int, str], failures: dict[int, str] | None
    ) -> Iterator[list[Row]]:
        """Embed sequences that are cut into pieces; each is yielded when its last piece has been embedded."""
        cut = [
            (number, start) for number, letters in sequences.items() for start in pieces.starts(len(letters))
        ]
        parts = {
            place: sequences[number][start : start + pieces.length]
            for place, (number, start) in enumerate(cut)
        }
        blends = {number: Blend(pieces, len(letters), self.pool) for number, letters in sequences.items()}
        failed = None if failures is None else dict[int, str]()
        for rows in self._embed_whole(parts, "none", failed):
            for place, row in rows:
                number, start = cut[place]
                blends[number].add(start, row)
                if blends[number].is_whole:
                    yield [(number, blends.pop(number).result)]
        if failures is not None and failed:
            failures |= {cut[place][0]: why for place, why in failed.items()}


def prepare_where_possible(model: RDModel) -> None:
    """Prepare a model in `eval` mode for inference, unless hooks or other libraries' modules are in it.

    Such a model is left as it is, without the warning of `prepare_inference`, for nobody asked to prepare it.
    """
    if not model.training and obstacle(model.family()) is None:
        model.prepare_inference()


def require_tokens_for(alphabet: Alphabet, pool: str, pieces: Pieces | None) -> None:
    """Require that an alphabet has the tokens that a way to embed needs.

    Args:
        alphabet: the alphabet of the model.
        pool: ways to pool residues, as `pool_name` joins them.
        pieces: how long sequences are cut into pieces; None keeps them whole.

    Raises:
        ValueError: for `cls`, where no token stands before a sequence; for pieces, where a token may be of
            several letters.
    """
    if "cls" in pools_of(pool) and not alphabet.prepend_bos:
        raise ValueError(
            "expected a pool over residues, got 'cls', though the model's tokenizer puts no token before a "
            "sequence"
        )
    if pieces is not None and not alphabet.is_per_letter:
        raise ValueError(
            "expected whole sequences, got windows, though the model's tokenizer makes tokens of several "
            "letters: cut long sequences (--max-length)"
        )


def require_prefixes(config: RDConfig, pool: str) -> None:
    """Require that embeddings can be cut afterwards: their first features are those of a shorter chain.

    Args:
        config: config of the chain.
        pool: ways to pool residues, as `pool_name` joins them.

    Raises:
        ValueError: for the baseline, and for `cls` where raw rows stand at `<cls>`.
    """
    if not config.is_nested:
        raise ValueError("expected a nested chain, got the baseline, whose levels are no prefixes")
    if "cls" in pools_of(pool) and config.special_rows == "larger":
        raise ValueError(
            "expected a pool over residues, got 'cls', where the largest backbone's own rows stand at <cls>, "
            "so that no prefix is the embedding of a shorter chain"
        )


def batch_embedder(model: RDModel, pool: str, width: int | None) -> Callable[[Tensor], list[Tensor]]:
    """Make a function that embeds a batch of tokens.

    Args:
        model: the chain.
        pool: ways to pool residues, as `pool_name` joins them.
        width: number of features to keep; None keeps all.

    Returns:
        The function. It takes `(batch, time)` token ids, and returns a tensor for each sequence, on the CPU.
    """
    family = model.family(width).values()

    @torch.inference_mode()
    def embed_batch(tokens: Tensor) -> list[Tensor]:
        """Return the embedding of each sequence."""
        require_memory(family, tokens)
        return _pool(model.encode(tokens, width=width), is_residue(tokens, model.alphabet), pool)

    return embed_batch


def _pool(embeddings: Tensor, residues: Tensor, pool: str) -> list[Tensor]:
    """Pool `(batch, time, width)` embeddings, `<cls>` first, to a tensor for each sequence, on the CPU."""
    rows, counts = embeddings[residues], residues.sum(1)
    if pool == "none":
        return list(rows.cpu().split(counts.tolist()))
    return list(pool_residues(rows, counts, embeddings[:, 0], pool).cpu())
