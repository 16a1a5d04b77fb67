"""Strings or FASTA to vectors, a few or a proteome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from rd_torch.batching import plan_batches, run_batches
from rd_torch.config import check_choice
from rd_torch.model import RDModel
from rd_torch.moments import float64_device
from rd_torch.sequences import Protein, normalized
from rd_torch.store.hdf5 import check_identifiers, write_embeddings
from rd_torch.tokens import is_residue

Pool: TypeAlias = Literal["mean", "none"]
Embedded: TypeAlias = tuple[int, np.ndarray]


class EmbedOptions(TypedDict, total=False):
    """What `embed` may be told."""

    pool: Pool
    width: int | None
    tokens_per_batch: int | None


def embed(
    model: RDModel,
    sequences: Sequence[str],
    *,
    pool: Pool = "mean",
    width: int | None = None,
    tokens_per_batch: int | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Embeds sequences and returns arrays in their order.

    Letters that are no residue are read as X, with one warning that counts them.

    Args:
        model: the chain; batches go to its device.
        sequences: amino-acid letters, in any case; an empty list gives an empty result.
        pool: `"mean"` averages over residues, `"none"` keeps one row a residue.
        width: features to return; by default all.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default what half of the
            free memory takes. Halved, with a warning, when memory runs out all the same.

    Returns:
        `(sequences, width)` for `"mean"`, a list of `(residues, width)` for `"none"`; in the maps'
        dtype, float32 unless the model is double.

    Raises:
        TypeError: for one string in place of several.
        ValueError: for an empty sequence, a pool or width that does not exist.
        MemoryError: for a sequence that takes more memory than there is.
    """
    if isinstance(sequences, str):
        raise TypeError("expected a sequence of strings, got one string: put it in a list")
    stream = embed_stream(
        model, normalized(sequences), pool=pool, width=width, tokens_per_batch=tokens_per_batch
    )
    arrays = dict(stream)
    ordered = [arrays[index] for index in range(len(arrays))]
    if pool == "none":
        return ordered
    features = model.embed_dim if width is None else width
    return np.stack(ordered) if ordered else np.zeros((0, features), dtype=np.float32)


def embed_to_file(
    model: RDModel,
    proteins: Sequence[Protein],
    path: Path,
    *,
    save_dtype: str = "float32",
    progress: Callable[[Iterable[Embedded]], Iterable[Embedded]] = iter,
    attributes: Mapping[str, Any] | None = None,
    **options: Unpack[EmbedOptions],
) -> None:
    """Embeds normalised proteins into an HDF5 file, one dataset a protein.

    The file appears under its name when the last protein is written, not before.

    Args:
        model: the chain.
        proteins: records with different identifiers.
        path: the HDF5 file; one that is there is replaced at the end.
        save_dtype: what the file holds.
        progress: wraps the stream of proteins, as `tqdm` does.
        attributes: more attributes for the file, beside levels, widths, width, pool and version.
        **options: `pool`, `width` and `tokens_per_batch` of `embed`.

    Raises:
        FileNotFoundError: when the folder is not there.
        ValueError: for identifiers that coincide, a pool or width that does not exist.
    """
    check_identifiers(protein.identifier for protein in proteins)
    widths = model.config.widths
    facts = {
        "levels": list(widths),
        "widths": list(widths.values()),
        "width": options.get("width") or model.embed_dim,
        "pool": options.get("pool", "mean"),
        "rd_torch_version": version("rd_torch"),
    }
    with write_embeddings(path, {**facts, **(attributes or {})}) as add:
        stream = embed_stream(model, (protein.sequence for protein in proteins), **options)
        for index, array in progress(stream):
            add(proteins[index].identifier, array.astype(save_dtype))


def embed_stream(
    model: RDModel, sequences: Iterable[str], **options: Unpack[EmbedOptions]
) -> Iterator[Embedded]:
    """Embeds normalised sequences as they come; yields `(index, array)` in the order of the batches.

    Arguments and errors as for `embed`.
    """
    pool, width = options.get("pool", "mean"), options.get("width")
    check_choice("pool", pool, ("mean", "none"))
    planned = plan_batches(model.family(width).values(), options.get("tokens_per_batch"))

    @torch.inference_mode()
    def vectors(tokens: Tensor) -> list[np.ndarray]:
        """One array a sequence."""
        return _pooled(model.encode(tokens, width=width), is_residue(tokens), pool)

    for batch in run_batches(vectors, sequences, *planned):
        yield from zip(batch.indices, batch.result, strict=True)


def _pooled(embeddings: Tensor, residues: Tensor, pool: Pool) -> list[np.ndarray]:
    """One array a sequence, over its residues alone."""
    rows, counts = embeddings[residues], residues.sum(1)
    if pool == "none":
        return np.split(rows.cpu().numpy(), counts.cumsum(0).tolist()[:-1])
    # In float64 and row after row: the mean of a prefix is the prefix of the mean, to the bit.
    exact = float64_device(rows.device)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64, device=exact)
    sums.index_add_(0, residues.nonzero()[:, 0].to(exact), rows.to(exact, torch.float64))
    return list((sums / counts[:, None].to(exact)).to(rows.dtype).cpu().numpy())
