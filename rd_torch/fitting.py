"""Fit a chain: stream sequences through backbones into joint moments, and solve the stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rd_torch.alphabet import Alphabet
from rd_torch.backbone import Backbone, Packing, as_backbone, is_real, is_residue, one_alphabet
from rd_torch.batching import plan_batches, run_batches
from rd_torch.letters import Kind
from rd_torch.loading import Place, load_backbone
from rd_torch.model import RDModel
from rd_torch.modules import device_of, digest_of, evaluating
from rd_torch.moments import RunningMoments
from rd_torch.reading import sequences_of
from rd_torch.sequences import Entry, normalize_sequences
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions, check_options
from rd_torch.store import ProgressCallback, cut_windows
from rd_torch.sums import Summands, Sums, record_fit
from rd_torch.weights import Hub, Source


def fit(
    backbones: Mapping[str, Source | nn.Module],
    sequences: Iterable[str],
    *,
    device: torch.device | str | None = None,
    tokens_per_batch: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fit a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level, smallest first, each as `RDModel.from_pretrained(backbones=...)` takes
            it: a file, a folder, a Hub id, `hf:` and a folder or Hub id, or a module. Modules are on one
            device, and the model that is returned shares their tensors.
        sequences: amino-acid letters, in any container that `embed` takes. It may be a generator: memory does
            not grow with the number of sequences.
        device: device to load backbones onto that are no modules; by default that of a module among them,
            else the CPU.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes. It is halved, with a warning, if memory runs out all the same.
        progress: function that is called with a number of residues that are done, and with True if an earlier
            run did them, else False.
        provenance: where backbones and sequences come from; it is saved with the model.
        work_folder: folder in which the moments are saved about once a minute, when a window of records,
            which are about 16 batches, is done. The same call after a kill goes on from there, and gives the
            same bits. The folder is left when the fit is finished, so that nothing is lost before the model
            is saved; then it can be removed.
        **options: `added`, `regressor`, `alpha` and `predict_from`, as in `solve_stages`; `scale`, `centre`
            and `rotate_first`, as in `change_basis`. A fit that goes on may have other ones than when it was
            begun.

    Returns:
        The fitted model, with the numbers of sequences and residues in its provenance. It is in `eval` mode,
        except that an `rd_torch.Backbone`, which becomes a part of it, keeps the mode that it had.

    Raises:
        FileNotFoundError: for a backbone that is not there, or if the folder in which `work_folder` is to be
            made is not there.
        BlockingIOError: if another process works in `work_folder`.
        ValueError: for fewer than two residues, an option that does not exist, backbones of different
            alphabets, embeddings that are not finite, or a folder that was begun with other backbones or
            sequences.
        TypeError: for a module that is no backbone, or a container that holds no sequences.

    Examples:
        >>> backbones = rd_torch.RDModel.from_pretrained("esm2-rd-mini").backbones
        >>> sequences = ["MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"]
        >>> chain = rd_torch.fit(backbones, sequences, regressor="ols")  # take a thousand or more
        >>> chain.config.provenance["fit"]["residues"]
        68
    """
    family = shared_family(load_backbones(backbones, device), **options)
    residues = normalize_sequences(sequences_of(sequences), kind_of(family))
    return fit_entries(
        family,
        (Entry("", sequence) for sequence in residues),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        provenance=provenance,
        work_folder=work_folder,
        **options,
    )


def load_backbones(
    backbones: Mapping[str, Source | nn.Module], device: torch.device | str | None = None
) -> dict[str, nn.Module]:
    """Load the backbones that are no modules yet, in float32.

    Args:
        backbones: the family by level, as in `fit`.
        device: device to load them onto; by default that of a module among them, else the CPU.

    Returns:
        The backbones by level.
    """
    modules = [each for each in backbones.values() if isinstance(each, nn.Module)]
    place = Place(torch.float32, device or (device_of(modules[0]) if modules else None))
    return {
        name: each if isinstance(each, nn.Module) else load_backbone(each, Hub(), name, place)
        for name, each in backbones.items()
    }


def fit_entries(
    backbones: Mapping[str, nn.Module],
    entries: Iterable[Entry],
    *,
    tokens_per_batch: int | None,
    progress: ProgressCallback,
    provenance: Mapping[str, Any] | None,
    work_folder: str | Path | None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fit a chain to records that are normalised and have no fault; their identifiers are not used.

    The other arguments, and the errors, are those of `fit`.

    Returns:
        The fitted model, as from `fit`.
    """
    family = shared_family(backbones, **options)
    budget, device = plan_batches(family.values(), tokens_per_batch)
    with (
        evaluating(*family.values()),
        Sums(
            summands_of(family), budget, device, work_folder, fixed_budget=tokens_per_batch is not None
        ) as sums,
    ):
        windows = 0
        for window in cut_windows(entries, sums.tokens_per_batch):
            windows = window.number + 1
            if window in sums.done:
                progress(window.residues, True)
                continue
            count = add_moments(family, sums.moments, window.contents, sums.tokens_per_batch, progress)
            sums.sequences += count
            sums.mark_done(window.number, window.checksum)
        sums.finish(windows)
        return make_chain(family, sums, provenance, **options)


def kind_of(family: Mapping[str, Backbone]) -> Kind:
    """Return what the sequences of a family are of, as the alphabet of its backbones says.

    Args:
        family: the backbones by level.
    """
    return next(iter(family.values())).alphabet.kind


def summands_of(family: Mapping[str, Backbone]) -> Summands:
    """Return what the moments of a family's raw embeddings are of.

    Args:
        family: the backbones by level, smallest first.
    """
    shapes = [backbone.level(name).architecture for name, backbone in family.items()]
    return Summands(
        {name: backbone.embed_dim for name, backbone in family.items()},
        lambda: digest_of(shapes, {f"{name}.": each.embedding_tensors() for name, each in family.items()}),
    )


def make_chain(
    family: Mapping[str, Backbone],
    sums: Sums,
    provenance: Mapping[str, Any] | None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Make the chain of a family whose residues are summed.

    Args:
        family: the backbones by level, smallest first.
        sums: the moments of all residues.
        provenance: where backbones and sequences come from; the numbers of sequences and residues and the
            options are added to it.
        **options: options of `solve_stages` and `change_basis`.

    Returns:
        The model, in `eval` mode.
    """
    counts = {"sequences": sums.sequences, "residues": sums.moments.count}
    stages, predict_from = sums.solve(**options), options.get("predict_from", SOLVE_DEFAULTS["predict_from"])
    chain = RDModel(
        family, stages, predict_from=predict_from, provenance=record_fit(provenance, counts, options)
    ).eval()
    chain.reconstructor = sums.solve_reconstruction(stages, predict_from)
    return chain


def shared_family(backbones: Mapping[str, nn.Module], **options: Unpack[SolveOptions]) -> dict[str, Backbone]:
    """Make backbones of our own that share the tensors of the given ones, and check the options of a fit.

    Args:
        backbones: the family by level, smallest first, as in `fit`.
        **options: options of `solve_stages` and `change_basis`.

    Returns:
        The family by level.

    Raises:
        ValueError: for an option that does not exist or does not fit the backbones' widths.
        TypeError: for a backbone of another kind.
    """
    family = {name: as_backbone(module) for name, module in backbones.items()}
    if family:
        one_alphabet(family)
    check_options([backbone.embed_dim for backbone in family.values()], **options)
    return family


def add_moments(
    family: Mapping[str, Backbone],
    moments: RunningMoments,
    sequences: Iterable[str],
    tokens_per_batch: int,
    progress: ProgressCallback = lambda residues, before: None,
) -> int:
    """Add the residues of sequences to the joint moments of a family.

    Args:
        family: the backbones by level, smallest first.
        moments: the moments to add to.
        sequences: residues alone, one letter each; they are read as they are needed.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most.
        progress: function that is called with a number of residues that are done, and False.

    Returns:
        The number of sequences that were added.
    """
    first = next(iter(family.values()))
    compute = partial(_embed_residues, family, first.alphabet)
    count = 0
    with evaluating(*family.values()):
        for batch in run_batches(compute, sequences, first.alphabet, tokens_per_batch, first.device):
            moments.update(batch.result)
            progress(len(batch.result), False)
            count += len(batch.indices)
    return count


@torch.no_grad()
def _embed_residues(family: Mapping[str, Backbone], alphabet: Alphabet, tokens: Tensor) -> Tensor:
    """Return `(residues, sum of widths)` raw embeddings of a batch's residues, by all backbones."""
    packing = Packing.of(is_real(tokens, alphabet))
    residues = packing.pack(is_residue(tokens, alphabet))
    return torch.cat([backbone(tokens, packing)[residues] for backbone in family.values()], dim=1)
