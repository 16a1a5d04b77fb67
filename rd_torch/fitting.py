"""Streams sequences through backbones, fills joint moments, solves the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from rd_torch.batching import plan_batches, run_batches
from rd_torch.config import PredictFrom, Regressor
from rd_torch.esm2 import ESM2
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.packing import Packing
from rd_torch.sequences import normalized
from rd_torch.solve import check_options, solve_stages
from rd_torch.tokens import is_real, is_residue


class SolveOptions(TypedDict, total=False):
    """What `solve_stages` may be told, with its defaults."""

    added: Sequence[int] | int | Literal["all"] | None
    regressor: Regressor
    alpha: float
    predict_from: PredictFrom


def fit(
    backbones: Mapping[str, nn.Module],
    sequences: Iterable[str],
    *,
    tokens_per_batch: int | None = None,
    progress: Callable[[int], object] = lambda residues: None,
    provenance: Mapping[str, Any] | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level name, smallest first, on one device: `rd_torch.ESM2` or
            `esm.ESM2`. Tensors are shared with the model that comes back.
        sequences: amino-acid letters; may be a generator, memory does not grow with their number.
        tokens_per_batch: tokens a batch holds at most, padding counted; by default what half of the
            free memory takes. Halved, with a warning, when memory runs out all the same.
        progress: called with residues that are done.
        provenance: where backbones and sequences come from; saved with the model.
        **options: `added`, `regressor`, `alpha` and `predict_from` of `solve_stages`.

    Returns:
        The fitted model in `eval` mode; its provenance counts sequences and residues.

    Raises:
        ValueError: for fewer than two residues, options that cannot be, or hidden states that are not
            finite.
        TypeError: for a backbone of another kind.
    """
    family = shared_family(backbones, **options)
    budget, device = plan_batches(family.values(), tokens_per_batch)
    moments = RunningMoments(sum(backbone.embed_dim for backbone in family.values()), device)
    count = add_moments(family, moments, normalized(sequences), budget, progress)
    return solved(family, moments, count, provenance, **options)


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
    progress: Callable[[int], object] = lambda residues: None,
) -> int:
    """Adds the residues of normalised sequences to the family's joint moments; returns how many came."""
    device = next(iter(family.values())).embed_tokens.weight.device
    count = 0
    for batch in run_batches(partial(_residues, family), sequences, tokens_per_batch, device):
        moments.update(batch.result)
        progress(len(batch.result))
        count += len(batch.indices)
    return count


def solved(
    family: Mapping[str, ESM2],
    moments: RunningMoments,
    count: int,
    provenance: Mapping[str, Any] | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """The model of a family and its joint moments, of `count` sequences, in `eval` mode."""
    widths = {name: backbone.embed_dim for name, backbone in family.items()}
    stages = solve_stages(moments, widths, **options)
    facts = {"sequences": count, "residues": moments.count, "solve": {"regressor": "pcr", **options}}
    return RDModel(
        family,
        stages,
        predict_from=options.get("predict_from", "nested"),
        provenance={**(provenance or {}), "fit": facts},
    ).eval()


@torch.no_grad()
def _residues(family: Mapping[str, ESM2], tokens: Tensor) -> Tensor:
    """`(residues, widths together)` raw embeddings of a batch, side by side."""
    packing = Packing.of(is_real(tokens))
    residues = packing.pack(is_residue(tokens))
    return torch.cat([backbone(tokens, packing)[residues] for backbone in family.values()], dim=1)
