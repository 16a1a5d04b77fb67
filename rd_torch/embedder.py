"""`Embedder`: sequences to vectors, batch by batch, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch.backbone import is_residue, obstacle
from rd_torch.batching import require_memory, run_batches
from rd_torch.model import RDModel
from rd_torch.pieces import Blend, Pieces
from rd_torch.pooling import pool_residues
from rd_torch.store import Row


class Embedder(NamedTuple):
    """How sequences are embedded.

    Attributes:
        model: the chain.
        pool: how residues are pooled, as `pool_name` has it.
        width: features to keep; None for all.
        pieces: how long sequences are cut; None where they stay whole.
        tokens_per_batch: tokens a batch holds at most.
        device: where batches go.
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
        """The embeddings of sequences, by their keys, batch by batch.

        Args:
            sequences: letters, residues only, by number.
            failures: if given, receives the number of a sequence that takes more memory than there is, and
                why.

        Raises:
            MemoryError: where one sequence alone takes more than there is, without `failures`.
        """
        if self.pieces is None:
            yield from self._whole(sequences, self.pool, failures)
            return
        long = {number: each for number, each in sequences.items() if len(each) > self.pieces.length}
        short = {number: each for number, each in sequences.items() if number not in long}
        yield from self._whole(short, self.pool, failures)
        yield from self._in_pieces(self.pieces, long, failures)

    def _whole(
        self, sequences: Mapping[int, str], pool: str, failures: dict[int, str] | None
    ) -> Iterator[list[Row]]:
        """The embeddings of sequences that stay whole."""
        numbers, failed = list(sequences), None if failures is None else dict[int, str]()
        compute = vectors_of(self.model, pool, self.width)
        for batch in run_batches(
            compute, sequences.values(), self.tokens_per_batch, self.device, failures=failed
        ):
            yield [(numbers[place], row) for place, row in zip(batch.indices, batch.result, strict=True)]
        if failures is not None and failed:
            failures |= {numbers[place]: why for place, why in failed.items()}

    def _in_pieces(
        self, pieces: Pieces, sequences: Mapping[int, str], failures: dict[int, str] | None
    ) -> Iterator[list[Row]]:
        """The embeddings of sequences that are cut, each when its last piece is there."""
        cut = [
            (number, start) for number, letters in sequences.items() for start in pieces.starts(len(letters))
        ]
        parts = {
            place: sequences[number][start : start + pieces.length]
            for place, (number, start) in enumerate(cut)
        }
        blends = {number: Blend(pieces, len(letters), self.pool) for number, letters in sequences.items()}
        failed = None if failures is None else dict[int, str]()
        for rows in self._whole(parts, "none", failed):
            for place, row in rows:
                number, start = cut[place]
                blends[number].add(start, row)
                if blends[number].is_whole:
                    yield [(number, blends.pop(number).result)]
        if failures is not None and failed:
            failures |= {cut[place][0]: why for place, why in failed.items()}


def prepare(model: RDModel) -> None:
    """Makes a model in `eval` mode ready for inference where that makes it faster, once.

    One with modules of others in it, or with hooks, is left as it is: nobody has asked for more.
    """
    if not model.training and obstacle(model.family()) is None:
        model.prepare_inference()


def vectors_of(model: RDModel, pool: str, width: int | None) -> Callable[[Tensor], list[Tensor]]:
    """What embeds a batch of tokens: one tensor a sequence, on the CPU."""
    family = model.family(width).values()

    @torch.inference_mode()
    def vectors(tokens: Tensor) -> list[Tensor]:
        """One tensor a sequence."""
        require_memory(family, tokens)
        return _pooled(model.encode(tokens, width=width), is_residue(tokens), pool)

    return vectors


def _pooled(embeddings: Tensor, residues: Tensor, pool: str) -> list[Tensor]:
    """One tensor a sequence, of `(batch, time, width)` embeddings that begin with `<cls>`."""
    rows, counts = embeddings[residues], residues.sum(1)
    if pool == "none":
        return list(rows.cpu().split(counts.tolist()))
    return list(pool_residues(rows, counts, embeddings[:, 0], pool).cpu())
