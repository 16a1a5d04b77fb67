"""`embedding_functions`: a chain in the place of an embedder in biotrainer's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, TypeAlias

import torch
from torch import Tensor

from rd_torch.embedding import embed
from rd_torch.model import RDModel

SEQUENCES_AT_ONCE: Final = 256
"""Number of sequences that are embedded before their embeddings are given."""

EmbeddingFunction: TypeAlias = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]


def embedding_functions(
    model: RDModel, *, width: int | None = None, tokens_per_batch: int | None = None
) -> dict[str, EmbeddingFunction]:
    """Make the functions by which `biotrainer.autoeval.autoeval_pipeline` embeds sequences.

    They are called `custom_embedding_function_per_residue` and `custom_embedding_function_per_sequence`
    there, so that what is returned is passed with two stars. Each takes sequences, and yields pairs of a
    sequence, as it was given, and its embedding: `(residues, width)`, or the `(width,)` mean of these.

    Args:
        model: the chain.
        width: number of features; by default all. Backbones beyond them do not run.
        tokens_per_batch: number of tokens that a batch holds at most, as in `rd_torch.embed`.

    Returns:
        Both functions, by name.

    Raises:
        ValueError: for a width that the chain does not have.

    Examples:
        >>> from rd_torch.biotrainer import embedding_functions
        >>> functions = embedding_functions(rd_torch.RDModel.from_pretrained("esm2-rd-mini"), width=48)
        >>> [each.shape for _, each in functions["custom_embedding_function_per_residue"](["MKV"])]
        [torch.Size([3, 48])]
    """
    model.config.require_width(width)

    def function(pool: str) -> EmbeddingFunction:
        """Return the function of a way to pool."""

        def embed_sequences(sequences: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
            """Yield each sequence with its embedding."""
            waiting = iter(sequences)
            while window := list(islice(waiting, SEQUENCES_AT_ONCE)):
                rows = embed(model, window, pool=pool, width=width, tokens_per_batch=tokens_per_batch)
                for sequence, row in zip(window, rows, strict=True):
                    yield sequence, torch.from_numpy(row)

        return embed_sequences

    return {
        "custom_embedding_function_per_residue": function("none"),
        "custom_embedding_function_per_sequence": function("mean"),
    }
