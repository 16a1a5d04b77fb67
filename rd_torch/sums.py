"""`Sums`: the joint moments of a family, the windows that are in them, and a file of both."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rd_torch.backbone import ESM2
from rd_torch.disk import LOCK, Lock, require_folder, take_lock, write_whole
from rd_torch.model import RDModel
from rd_torch.modules import digest_of
from rd_torch.moments import RunningMoments
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions, solve_stages
from rd_torch.store import Window

SECONDS_BETWEEN_SAVES: Final = 60
"""At most so often are moments saved: those of the whole ESM-2 family are 865 MB."""

MOMENTS: Final = "moments.safetensors"


@dataclass(frozen=True)
class Summed:
    """Which windows of sequences are in moments.

    Attributes:
        checksums: of those that are, by number.
        place: the folder where that is saved, if any.
    """

    checksums: dict[int, str]
    place: Path | None = None

    def __contains__(self, window: Window[str]) -> bool:
        """Whether a window is among them; raises a ValueError for one of other sequences."""
        found = self.checksums.get(window.number)
        if found not in (None, window.checksum):
            raise self._refused("others")
        return found is not None

    def require(self, windows: int) -> None:
        """Raises a ValueError where more windows are among them than there are."""
        if any(number >= windows for number in self.checksums):
            raise self._refused("fewer")

    def _refused(self, got: str) -> ValueError:
        return ValueError(
            f"expected the sequences with which the fit in {self.place} was begun, got {got}: take those, or "
            "remove that folder"
        )


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
        done: the windows that are in them.

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
        self.done = Summed({})
        self._saved = time.monotonic()
        self._file: Path | None = None
        self._lock: Lock | None = None
        if folder is not None:
            folder = Path(folder).resolve()
            require_folder(folder)
            folder.mkdir(exist_ok=True)
            self._lock = take_lock(folder, folder)
            self._file = folder / MOMENTS
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
        self.done = Summed({int(number): each for number, each in facts["done"].items()}, file.parent)

    def add(self, number: int, checksum: str) -> None:
        """Notes a window that moments and sequences count by now; saves everything now and then."""
        self.done.checksums[number] = checksum
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            self._save()

    def finish(self, windows: int) -> None:
        """Saves the moments of so many windows.

        Raises:
            ValueError: for fewer windows than the folder was begun with.
        """
        self.done.require(windows)
        self._save()

    def _facts(self) -> dict[str, Any]:
        """What the moments are of."""
        return {
            "levels": {name: backbone.embed_dim for name, backbone in self.family.items()},
            "fingerprint": self._fingerprint,
            "tokens_per_batch": self.tokens_per_batch,
            "sequences": self.sequences,
            "residues": self.moments.count,
            "done": self.done.checksums,
            "rd_torch_version": version("rd_torch"),
        }

    def _save(self) -> None:
        """Writes everything to the file, where there is one."""
        if self._file is not None:
            _, mean, scatter = self.moments.parts
            tensors = {"mean": mean.cpu(), "scatter": scatter.cpu()}
            metadata = {"facts": json.dumps(self._facts())}
            write_whole(self._file, lambda part: save_file(tensors, part, metadata))
        self._saved = time.monotonic()

    def solved(self, provenance: Mapping[str, Any] | None, **options: Unpack[SolveOptions]) -> RDModel:
        """The model of the family and its moments, in `eval` mode."""
        widths = {name: backbone.embed_dim for name, backbone in self.family.items()}
        stages = solve_stages(self.moments, widths, **options)
        chosen: SolveOptions = {"regressor": SOLVE_DEFAULTS["regressor"], **options}
        counts = {"sequences": self.sequences, "residues": self.moments.count}
        return RDModel(
            self.family,
            stages,
            predict_from=options.get("predict_from", SOLVE_DEFAULTS["predict_from"]),
            provenance={**(provenance or {}), "fit": counts | {"solve": chosen}},
        ).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back; what is saved stays for the next time, unless it is nothing."""
        if self._lock:
            self._lock.release()
        if self._file and not self.done.checksums:
            clear(self._file.parent)


def clear(folder: Path) -> None:
    """Removes what a fit left in its folder, and the folder where nothing else is in it."""
    (folder / MOMENTS).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # other things are in it
        folder.rmdir()


def _fingerprint(family: Mapping[str, ESM2]) -> str:
    """A digest of every number that raw embeddings depend on."""
    heads = [backbone.attention_heads for backbone in family.values()]
    return digest_of(heads, {f"{name}.": backbone.embedding_tensors() for name, backbone in family.items()})
