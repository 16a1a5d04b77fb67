"""Streams sequences through backbones, fills joint moments, solves the stages."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, Self, TypedDict, Unpack

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rd_torch.batching import plan_batches, run_batches
from rd_torch.config import PredictFrom, Regressor
from rd_torch.esm2 import ESM2
from rd_torch.model import RDModel
from rd_torch.moments import RunningMoments
from rd_torch.nesting import digest_of
from rd_torch.packing import Packing
from rd_torch.sequences import Protein, normalized
from rd_torch.solve import check_options, solve_stages
from rd_torch.store import cut_windows
from rd_torch.store.format import require_folder, written_whole
from rd_torch.store.work import Progress, locked
from rd_torch.tokens import is_real, is_residue

SECONDS_BETWEEN_SAVES: Final = 60
"""At most so often are moments saved: those of the whole ESM-2 family are 865 MB."""


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
    progress: Progress = lambda residues, before: None,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    **options: Unpack[SolveOptions],
) -> RDModel:
    """Fits a reverse-distilled chain in one pass over the sequences.

    Args:
        backbones: the family by level name, smallest first, on one device: `rd_torch.ESM2` or
            `esm.ESM2`. Tensors are shared with the model that comes back.
        sequences: amino-acid letters; may be a generator, memory does not grow with their number.
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
        The fitted model in `eval` mode; its provenance counts sequences and residues.

    Raises:
        BlockingIOError: when another process works in the folder.
        ValueError: for fewer than two residues, options that cannot be, hidden states that are not finite,
            or a folder that was begun with other backbones or sequences.
        TypeError: for a backbone of another kind.
    """
    family = shared_family(backbones, **options)
    budget, device = plan_batches(family.values(), tokens_per_batch)
    with Sums(family, budget, device, work_folder, fixed_budget=tokens_per_batch is not None) as sums:
        windows = 0
        for window in cut_windows((Protein("", one) for one in normalized(sequences)), sums.tokens_per_batch):
            windows = window.number + 1
            if is_summed(sums.done, window.number, window.checksum):
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
    progress: Progress = lambda residues, before: None,
) -> int:
    """Adds the residues of normalised sequences to the family's joint moments; returns how many came."""
    device = next(iter(family.values())).embed_tokens.weight.device
    count = 0
    for batch in run_batches(partial(_residues, family), sequences, tokens_per_batch, device):
        moments.update(batch.result)
        progress(len(batch.result), False)
        count += len(batch.indices)
    return count


def is_summed(done: Mapping[int, str], number: int, checksum: str) -> bool:
    """Whether a window is among those that are in the moments, by number.

    Raises:
        ValueError: for a window of other sequences.
    """
    if number in done and done[number] != checksum:
        raise ValueError(
            "expected the sequences with which the fit was begun, got others: take those, or remove what "
            "is unfinished"
        )
    return number in done


class Sums:
    """The joint moments of a family, and which windows of sequences are in them.

    With a folder both are one file in it, which a later process goes on from.

    Args:
        family: its backbones.
        tokens_per_batch: the budget that windows are cut by; the recorded one counts in its place.
        device: where the moments are.
        folder: made if need be, and held under a lock.
        fixed_budget: whether the budget must be the recorded one.

    Attributes:
        moments: of all residues so far.
        sequences: how many that were.
        done: checksums of the windows that are in them, by number.

    Raises:
        FileNotFoundError: when there is no place for the folder.
        BlockingIOError: when another process works in it.
        ValueError: for a folder that was begun with another family or budget, or does not read.
    """

    def __init__(
        self,
        family: Mapping[str, ESM2],
        tokens_per_batch: int,
        device: torch.device | str = "cpu",
        folder: str | Path | None = None,
        *,
        fixed_budget: bool = False,
    ) -> None:
        self.family, self.tokens_per_batch = family, tokens_per_batch
        self.moments = RunningMoments(sum(backbone.embed_dim for backbone in family.values()), device)
        self.sequences = 0
        self.done: dict[int, str] = {}
        self._saved = time.monotonic()
        self._file: Path | None = None
        self._lock: FileLock | None = None
        if folder is not None:
            folder = Path(folder).resolve()
            require_folder(folder)
            folder.mkdir(exist_ok=True)
            self._lock = locked(folder, folder)
            self._file = folder / "moments.safetensors"
            self._fingerprint = _fingerprint(family)
            if self._file.exists():
                self._go_on(self._file, fixed_budget)
            else:
                self._save()

    def _go_on(self, file: Path, fixed_budget: bool) -> None:
        """Takes up what is saved."""
        try:
            with safe_open(file, framework="pt") as saved:
                facts = json.loads(saved.metadata()["facts"])
                mean, scatter = (saved.get_tensor(name).clone() for name in ("mean", "scatter"))
        except SafetensorError as error:
            raise ValueError(f"expected moments in {file}, got what does not read: remove it") from error
        ours = self._facts()
        for name in ("levels", "fingerprint"):
            if facts[name] != ours[name]:
                raise ValueError(
                    f"expected the {name} {facts[name]}, with which {file.parent} was begun, got "
                    f"{ours[name]}: take the same backbones, or remove the folder"
                )
        if fixed_budget and facts["tokens_per_batch"] != self.tokens_per_batch:
            raise ValueError(
                f"expected tokens_per_batch {facts['tokens_per_batch']}, with which {file.parent} was begun, "
                f"got {self.tokens_per_batch}: leave it out, or remove the folder"
            )
        device = self.moments.mean.device
        self.moments = RunningMoments.of(facts["residues"], mean.to(device), scatter.to(device))
        self.sequences, self.tokens_per_batch = facts["sequences"], facts["tokens_per_batch"]
        self.done = {int(number): checksum for number, checksum in facts["done"].items()}

    def add(self, number: int, checksum: str) -> None:
        """Notes a window that moments and sequences count by now; saves everything now and then."""
        self.done[number] = checksum
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            self._save()

    def finish(self, windows: int) -> None:
        """Saves the moments of so many windows.

        Raises:
            ValueError: for fewer windows than the folder was begun with.
        """
        if any(number >= windows for number in self.done):
            raise ValueError(
                "expected the sequences with which the fit was begun, got fewer: take those, or remove what "
                "is unfinished"
            )
        self._save()

    def _facts(self) -> dict[str, Any]:
        """What the moments are of."""
        return {
            "levels": {name: backbone.embed_dim for name, backbone in self.family.items()},
            "fingerprint": self._fingerprint,
            "tokens_per_batch": self.tokens_per_batch,
            "sequences": self.sequences,
            "residues": self.moments.count,
            "done": self.done,
            "rd_torch_version": version("rd_torch"),
        }

    def _save(self) -> None:
        """Writes everything to the file, where there is one."""
        if self._file is not None:
            _, mean, scatter = self.moments.parts
            tensors = {"mean": mean.cpu(), "scatter": scatter.cpu()}
            metadata = {"facts": json.dumps(self._facts())}
            written_whole(self._file, lambda part: save_file(tensors, part, metadata))
        self._saved = time.monotonic()

    def solved(self, provenance: Mapping[str, Any] | None, **options: Unpack[SolveOptions]) -> RDModel:
        """The model of the family and its moments, in `eval` mode."""
        widths = {name: backbone.embed_dim for name, backbone in self.family.items()}
        stages = solve_stages(self.moments, widths, **options)
        counts = {"sequences": self.sequences, "residues": self.moments.count}
        return RDModel(
            self.family,
            stages,
            predict_from=options.get("predict_from", "nested"),
            provenance={**(provenance or {}), "fit": counts | {"solve": {"regressor": "pcr", **options}}},
        ).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back; what is saved stays for the next time."""
        if self._lock:
            self._lock.release()


def _fingerprint(family: Mapping[str, ESM2]) -> str:
    """A digest of every number that raw embeddings depend on."""
    tensors = {
        f"{level}.{name}": tensor
        for level, backbone in family.items()
        for name, tensor in backbone.tensors().items()
        if not name.startswith(("lm_head.", "contact_head."))
    }
    return digest_of([backbone.attention_heads for backbone in family.values()], tensors)


@torch.no_grad()
def _residues(family: Mapping[str, ESM2], tokens: Tensor) -> Tensor:
    """`(residues, widths together)` raw embeddings of a batch, side by side."""
    packing = Packing.of(is_real(tokens))
    residues = packing.pack(is_residue(tokens))
    return torch.cat([backbone(tokens, packing)[residues] for backbone in family.values()], dim=1)
