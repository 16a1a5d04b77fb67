"""Streams sequences through backbones, fills joint moments, solves the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypedDict

import torch
from torch import nn
from typing_extensions import Unpack

from rd_torch.config import ALPHABET, PredictFrom, Regressor
from rd_torch.esm2 import ESM2
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.packing import Packing
from rd_torch.sequences import cut_batches, is_residue, normalized, tokenize
from rd_torch.solve import solve_stages

DEFAULT_TOKENS_PER_BATCH = 8_192

Progress = Callable[[Iterable[int]], Iterable[int]]


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
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    progress: Progress = iter,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level name, smallest first, on one device: `rd_torch.ESM2` or
            `esm.ESM2`. Tensors are shared with the model that comes back.
        sequences: amino-acid letters; may be a generator, memory does not grow with their number.
        tokens_per_batch: tokens a batch holds at most, padding counted.
        progress: wraps the stream of residues counted per batch, as `tqdm` does.
        **options: `added`, `regressor`, `alpha` and `predict_from` of `solve_stages`.

    Returns:
        The fitted model in `eval` mode; its provenance counts sequences and residues.

    Raises:
        ValueError: for fewer than two residues, options that cannot be, or hidden states that are not
            finite.
        TypeError: for a backbone of another kind.
    """
    family = {name: ESM2.sharing(module) for name, module in backbones.items()}
    widths = {name: backbone.embed_dim for name, backbone in family.items()}
    device = next(iter(family.values())).embed_tokens.weight.device
    moments = RunningMoments(sum(widths.values()), device)
    count = _Count()
    batches = cut_batches(count(normalized(sequences)), tokens_per_batch)
    for _ in progress(_update(moments, family, batches)):
        pass
    stages = solve_stages(moments, widths, **options)
    provenance = {
        "fit": {
            "sequences": count.items,
            "residues": moments.count,
            "regressor": options.get("regressor", "pcr"),
            "alpha": options.get("alpha", 1.0) if options.get("regressor") == "ridge" else None,
        }
    }
    return RDModel(
        family, stages, predict_from=options.get("predict_from", "nested"), provenance=provenance
    ).eval()


class _Count:
    """Counts what passes through."""

    items = 0

    def __call__(self, sequences: Iterable[str]) -> Iterator[str]:
        for sequence in sequences:
            self.items += 1
            yield sequence


@torch.no_grad()
def _update(
    moments: RunningMoments, family: Mapping[str, ESM2], batches: Iterable[list[tuple[int, str]]]
) -> Iterator[int]:
    """Adds the residues of each batch to the joint moments; yields how many sequences it held."""
    device = next(iter(family.values())).embed_tokens.weight.device
    for batch in batches:
        tokens = tokenize([sequence for _, sequence in batch]).to(device)
        packing = Packing.of(tokens != ALPHABET.padding_idx)
        residues = packing.pack(is_residue(tokens))
        hidden = [backbone(tokens, packing)[residues] for backbone in family.values()]
        moments.update(torch.cat(hidden, dim=1))
        yield len(batch)
