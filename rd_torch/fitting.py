"""Streams sequences through backbones, fills joint moments, solves the stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rd_torch.backbone import ESM2, Packing, is_real, is_residue
from rd_torch.batching import plan_batches, run_batches
from rd_torch.model import RDModel
from rd_torch.modules import evaluating
from rd_torch.moments import RunningMoments
from rd_torch.reading import sequences_of
from rd_torch.sequences import Entry, normalize_sequences
from rd_torch.solve import SolveOptions, check_options
from rd_torch.store import ProgressCallback, cut_windows
from rd_torch.sums import Sums


def fit(
    backbones: Mapping[str, nn.Module],
    sequences: Iterable[str],
    *,
    tokens_per_batch: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level name, smallest first, on one device: `rd_torch.ESM2` or
            `esm.ESM2`. Tensors are shared with the model that comes back.
        sequences: amino-acid letters, in whatever `embed` takes them in; may be a generator, memory does not
            grow with their number.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default what half of the
            free memory takes. Halved, with a warning, when memory runs out all the same.
        progress: called with residues that are done, and whether they were so before.
        provenance: where backbones and sequences come from; saved with the model.
        work_folder: where the moments are saved once a minute, when a window of about 16 batches is done.
            A fit that is called with it again, after a kill, goes on from there, to the same bits; it is
            left as it is, so that nothing is lost until the model is saved, and can be removed then.
        **options: `added`, `regressor`, `alpha` and `predict_from` of `solve_stages`; other ones may be
            taken when a fit goes on.

    Returns:
        The fitted model in `eval` mode, but that `rd_torch.ESM2` backbones, which are parts of it, keep
        theirs; while residues are embedded all are in `eval`. Its provenance counts sequences and residues.

    Raises:
        BlockingIOError: when another process works in the folder.
        ValueError: for fewer than two residues, options that cannot be, hidden states that are not finite,
            or a folder that was begun with other backbones or sequences.
        TypeError: for a backbone of another kind, or what holds no sequences.

    Examples:
        >>> backbones = rd_torch.RDModel.from_pretrained("esm2-rd-mini").backbones
        >>> sequences = ["MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"]
        >>> chain = rd_torch.fit(backbones, sequences, regressor="ols")  # take a thousand or more
        >>> chain.config.provenance["fit"]["residues"]
        68
    """
    residues = normalize_sequences(sequences_of(sequences))
    return fit_entries(
        backbones,
        (Entry("", sequence) for sequence in residues),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        provenance=provenance,
        work_folder=work_folder,
        **options,
    )


def fit_entries(
    backbones: Mapping[str, nn.Module],
    entries: Iterable[Entry],
    *,
    tokens_per_batch: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fit a chain to records that are normalised and sound; arguments and errors are else those of `fit`."""
    family = shared_family(backbones, **options)
    budget, device = plan_batches(family.values(), tokens_per_batch)
    with (
        evaluating(*family.values()),
        Sums(family, budget, device, work_folder, fixed_budget=tokens_per_batch is not None) as sums,
    ):
        windows = 0
        for window in cut_windows(entries, sums.tokens_per_batch):
            windows = window.number + 1
            if window in sums.done:
                progress(window.residues, True)
                continue
            count = add_moments(family, sums.moments, window.contents, sums.tokens_per_batch, progress)
            sums.sequences += count
            sums.add(window.number, window.checksum)
        sums.finish(windows)
        return sums.solved(provenance, **options)


def shared_family(backbones: Mapping[str, nn.Module], **options: Unpack[SolveOptions]) -> dict[str, ESM2]:
    """The backbones as ours, tensors shared; options are checked against their widths.

    Raises:
        ValueError: for options that cannot be.
        TypeError: for a backbone of another kind.
    """
    family = {name: ESM2.sharing(module) for name, module in backbones.items()}
    check_options([backbone.embed_dim for backbone in family.values()], **options)
    return family


def add_moments(
    family: Mapping[str, ESM2],
    moments: RunningMoments,
    sequences: Iterable[str],
    tokens_per_batch: int,
    progress: ProgressCallback = lambda residues, before: None,
) -> int:
    """Adds the residues of normalised sequences to the family's joint moments; returns how many came."""
    device = next(iter(family.values())).device
    count = 0
    with evaluating(*family.values()):
        for batch in run_batches(partial(_residues, family), sequences, tokens_per_batch, device):
            moments.update(batch.result)
            progress(len(batch.result), False)
            count += len(batch.indices)
    return count


@torch.no_grad()
def _residues(family: Mapping[str, ESM2], tokens: Tensor) -> Tensor:
    """`(residues, widths together)` raw embeddings of a batch, side by side."""
    packing = Packing.of(is_real(tokens))
    residues = packing.pack(is_residue(tokens))
    return torch.cat([backbone(tokens, packing)[residues] for backbone in family.values()], dim=1)
