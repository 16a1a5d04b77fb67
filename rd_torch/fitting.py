"""Fit a chain: stream sequences through backbones into joint moments, and solve the stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from rd_torch.candidates import CRITERION, Candidates, FitOptions, solve_options
from rd_torch.levels import split_level
from rd_torch.loading import Place, load_backbone
from rd_torch.model import RDModel
from rd_torch.modules import device_of, evaluating
from rd_torch.reading import sequences_of
from rd_torch.sequences import Entry, normalize_sequences
from rd_torch.solve import SOLVE_DEFAULTS
from rd_torch.store import ProgressCallback, cut_windows
from rd_torch.sums import Sums, record_fit
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
    **options: Unpack[FitOptions],
) -> RDModel:
    """Fit a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level, smallest first, each as `RDModel.from_pretrained(backbones=...)` takes
            it: a file, a folder, a Hub id, `hf:` and a folder or Hub id, or a module. Modules are on one
            device, and the model that is returned shares their tensors. A level whose name states a layer,
            `"650M@25"`, is taken there; levels of several layers of one backbone are given the same.
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
            and `rotate_first`, as in `change_basis`; and

            - `layers`: layers that levels may be taken from: a number or a list of numbers by backbone,
              `{"650M": [24, 25, 26]}`, one list for all backbones, or `"all"`. All candidates are summed in
              the one pass, which takes `8 * (sum of their widths)**2` bytes at the most.
            - `choose_layers`: how one of several candidates is chosen for each level: a criterion of
              `rd_torch.choose_layers`, by default `"rank"`; or `"labels"`, for the layer whose nested
              embedding predicts labels best by cross-validation. What is chosen, by what, and what each
              candidate was worth is saved with the model.
            - `labelled`: an `rd_torch.Labelled`, sequences with labels, for `"labels"`.
            - `final_norm`: whether a backbone's last LayerNorm acts on layers before the last; by default it
              does.

            A fit that goes on may have other options than when it was begun, apart from `layers` and
            `final_norm`.

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
    candidates = Candidates.of(load_backbones(backbones, device), **options)
    residues = normalize_sequences(sequences_of(sequences), candidates.kind)
    return fit_entries(
        candidates,
        (Entry("", sequence) for sequence in residues),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        provenance=provenance,
        work_folder=work_folder,
        **options,
    )


def load_backbones(
    backbones: Mapping[str, Source | nn.Module],
    device: torch.device | str | None = None,
    hub: Hub | None = None,
) -> dict[str, nn.Module]:
    """Load the backbones that are no modules yet, in float32, each once.

    Args:
        backbones: the family by level, as in `fit`.
        device: device to load them onto; by default that of a module among them, else the CPU.
        hub: how to reach the Hub, and whose code may run.

    Returns:
        The backbones by level, as far as the last layer that a level takes. Levels of one backbone have the
        same module.

    Raises:
        ValueError: for levels of one backbone that come from different places.
    """
    modules = [each for each in backbones.values() if isinstance(each, nn.Module)]
    place = Place(torch.float32, device or (device_of(modules[0]) if modules else None))
    deepest: dict[str, tuple[str, Source | nn.Module]] = {}
    for name, each in backbones.items():
        known, other = deepest.get(split_level(name)[0], (name, each))
        if other is not each and other != each:
            raise ValueError(f"expected one source of the backbone of {known} and {name}, got two")
        deepest[split_level(name)[0]] = max((known, each), (name, each), key=lambda pair: _layer(pair[0]))
    loaded = {
        backbone: each if isinstance(each, nn.Module) else load_backbone(each, hub or Hub(), name, place)
        for backbone, (name, each) in deepest.items()
    }
    return {name: loaded[split_level(name)[0]] for name in backbones}


def _layer(name: str) -> float:
    """Return the layer that a level's name states, infinity for the last."""
    layer = split_level(name)[1]
    return inf if layer is None else layer


def fit_entries(
    candidates: Candidates,
    entries: Iterable[Entry],
    *,
    tokens_per_batch: int | None,
    progress: ProgressCallback,
    provenance: Mapping[str, Any] | None,
    work_folder: str | Path | None,
    **options: Unpack[FitOptions],
) -> RDModel:
    """Fit a chain to records that are normalised and have no fault; their identifiers are not used.

    `candidates` are the levels that the chain may be made of, by the same options. The other arguments, and
    the errors, are those of `fit`.

    Returns:
        The fitted model, as from `fit`.
    """
    budget, device = candidates.plan(tokens_per_batch)
    with (
        evaluating(*candidates.family.values()),
        Sums(
            candidates.summands(), budget, device, work_folder, fixed_budget=tokens_per_batch is not None
        ) as sums,
    ):
        windows = 0
        for window in cut_windows(entries, sums.tokens_per_batch):
            windows = window.number + 1
            if window in sums.done:
                progress(window.residues, True)
                continue
            count = candidates.add_moments(sums.moments, window.contents, sums.tokens_per_batch, progress)
            sums.sequences += count
            sums.mark_done(window.number, window.checksum)
        sums.finish(windows)
        return make_chain(candidates, sums, provenance, **options)


def make_chain(
    candidates: Candidates,
    sums: Sums,
    provenance: Mapping[str, Any] | None,
    **options: Unpack[FitOptions],
) -> RDModel:
    """Make the chain of a family whose residues are summed.

    Args:
        candidates: the levels that the chain may be made of.
        sums: the moments of all residues.
        provenance: where backbones and sequences come from; the numbers of sequences and residues, the
            options and what was chosen are added to it.
        **options: options of `fit`.

    Returns:
        The model, in `eval` mode.
    """
    solving, chosen = solve_options(options), candidates.choose(sums, **options)
    counts: dict[str, Any] = {"sequences": sums.sequences, "residues": sums.moments.count}
    if chosen.scores:
        counts["layers"] = {"chosen by": options.get("choose_layers", CRITERION), "scores": chosen.scores}
        labelled = options.get("labelled")
        if labelled and options.get("choose_layers") == "labels":
            counts["layers"] |= {"labels": labelled.name, "labelled sequences": len(labelled.sequences)}
    stages, predict_from = (
        sums.solve(chosen.levels, **solving),
        options.get("predict_from", SOLVE_DEFAULTS["predict_from"]),
    )
    chain = RDModel(
        {name: candidates.family[name] for name in chosen.levels},
        stages,
        predict_from=predict_from,
        final_norm=candidates.final_norm,
        provenance=record_fit(provenance, counts, solving),
    ).eval()
    chain.reconstructor = sums.solve_reconstruction(stages, predict_from, chosen.levels)
    return chain
