"""`Sums`: joint moments of raw embeddings, which windows of records are in them, and a file of both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rd_torch.basis import solve_chain
from rd_torch.choices import PredictFrom
from rd_torch.disk import LOCK, Lock, require_folder, take_lock, write_whole
from rd_torch.maps import Maps
from rd_torch.modules import require_module_names
from rd_torch.moments import Alternatives, RunningMoments
from rd_torch.reconstruct import Reconstructor, solve_reconstruction
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions
from rd_torch.store import Window

SECONDS_BETWEEN_SAVES: Final = 60
"""Least number of seconds between two saves: the moments of all sizes of ESM-2 take 865 MB."""

MOMENTS: Final = "moments.safetensors"
"""Name of the file that holds the moments, and in its metadata the facts of which windows are in them."""


@dataclass(frozen=True)
class Summands:
    """What the moments are of.

    Attributes:
        widths: width of each raw embedding by level, in the order in which they are concatenated.
        fingerprint: function that returns a digest of all that the rows depend on besides the records; it is
            called only where moments are saved.
        kind: what the records hold, as errors call it.
        alternatives: widths of the levels in groups of which one each will be chosen, if that is so.
    """

    widths: Mapping[str, int]
    fingerprint: Callable[[], str]
    kind: str = "sequences"
    alternatives: Alternatives | None = None


@dataclass(frozen=True)
class SummedWindows:
    """Which windows of records the moments count.

    Attributes:
        checksums: checksums of these windows, by the windows' numbers.
        folder: the folder where they are saved, if any.
        kind: what the records hold, as errors call it.
    """

    checksums: dict[int, str]
    folder: Path | None = None
    kind: str = "sequences"

    def __contains__(self, window: Window[Any]) -> bool:
        """Return whether the moments count a window.

        Raises:
            ValueError: if they count other records under its number.
        """
        found = self.checksums.get(window.number)
        if found not in (None, window.checksum):
            raise self._other_records("others")
        return found is not None

    def require_no_more_than(self, windows: int) -> None:
        """Require that the moments count no window beyond the first `windows`.

        Raises:
            ValueError: if they do: the records are fewer than those that were counted.
        """
        if any(number >= windows for number in self.checksums):
            raise self._other_records("fewer")

    def _other_records(self, got: str) -> ValueError:
        """Return the error for records that are not those with which the fit was begun."""
        return ValueError(
            f"expected the {self.kind} with which the fit in {self.folder} was begun, got {got}: take those, "
            "or remove the folder"
        )


class Sums:
    """Joint moments of raw embeddings, and which windows of records they count.

    With a folder both are saved to one file in it, from which a later process goes on.

    Args:
        summands: what the moments are of.
        tokens_per_batch: number of tokens in a batch, by which windows are cut; where no backbone runs, a
            number of rows.
        device: device to put the moments on.
        folder: the folder; it is made if it does not exist, and locked while this object is in use.
        fixed_budget: if true, refuse a folder that was begun with another `tokens_per_batch`; if false, use
            the one that it was begun with.

    Attributes:
        moments: moments of all rows that were counted.
        sequences: number of sequences that these rows are from.
        done: the windows that the moments count.

    Raises:
        FileNotFoundError: if the folder in which `folder` is to be made is not there.
        BlockingIOError: if another process works in the folder.
        ValueError: for a folder that was begun with other summands or another budget, or cannot be read, and
            for a level whose name no module can have.
    """

    def __init__(
        self,
        summands: Summands,
        tokens_per_batch: int,
        device: torch.device | str = "cpu",
        folder: str | Path | None = None,
        *,
        fixed_budget: bool = False,
    ) -> None:
        require_module_names(summands.widths)  # in time: the names are of modules when all is summed
        self.widths, self.tokens_per_batch = dict(summands.widths), tokens_per_batch
        width = sum(self.widths.values())
        self.moments = RunningMoments(width, device, alternatives=summands.alternatives)
        self.sequences = 0
        self.done = SummedWindows({}, kind=summands.kind)
        self._saved = time.monotonic()
        self._file: Path | None = None
        self._lock: Lock | None = None
        if folder is not None:
            folder = Path(folder).resolve()
            require_folder(folder)
            folder.mkdir(exist_ok=True)
            self._lock = take_lock(folder, folder)
            self._file = folder / MOMENTS
            self._fingerprint = summands.fingerprint()
            if self._file.exists():
                self._resume(self._file, fixed_budget)
            else:
                self._save()

    def _resume(self, file: Path, fixed_budget: bool) -> None:
        """Go on from what is saved; raise a ValueError if that is of something else, or cannot be read."""
        try:
            with safe_open(file, framework="pt") as saved:
                facts = json.loads(saved.metadata()["facts"])
                mean, scatter = (saved.get_tensor(name).clone() for name in ("mean", "scatter"))
        except SafetensorError as error:
            raise ValueError(
                f"expected moments in {file}, got a file that cannot be read: remove it"
            ) from error
        current = self._facts()
        for name in ("levels", "alternatives", "fingerprint"):
            if facts.get(name) != current[name]:
                raise ValueError(
                    f"expected the {name} {facts.get(name)}, with which {file.parent} was begun, got "
                    f"{current[name]}: take what it was begun with, or remove the folder"
                )
        if fixed_budget and facts["tokens_per_batch"] != self.tokens_per_batch:
            raise ValueError(
                f"expected tokens_per_batch {facts['tokens_per_batch']}, with which {file.parent} was begun, "
                f"got {self.tokens_per_batch}: leave it out, or remove the folder"
            )
        device = self.moments.mean.device
        self.moments = RunningMoments.of(
            facts["residues"],
            mean.to(device),
            scatter.to(device),
            alternatives=self.moments.alternatives,
        )
        self.sequences, self.tokens_per_batch = facts["sequences"], facts["tokens_per_batch"]
        checksums = {int(number): checksum for number, checksum in facts["done"].items()}
        self.done = replace(self.done, checksums=checksums, folder=file.parent)

    def mark_done(self, number: int, checksum: str) -> None:
        """Note that the moments count a window now, and save them if the last save is long ago.

        Args:
            number: the window's number.
            checksum: the window's checksum.
        """
        self.done.checksums[number] = checksum
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            self._save()

    def finish(self, windows: int) -> None:
        """Save the moments when all windows are counted.

        Args:
            windows: number of windows that the records make.

        Raises:
            ValueError: for fewer windows than the folder was begun with.
        """
        self.done.require_no_more_than(windows)
        self._save()

    def _facts(self) -> dict[str, Any]:
        """Return what is saved beside the moments: what they are of, and which windows they count."""
        return {
            "levels": self.widths,
            "alternatives": self.moments.alternatives,
            "fingerprint": self._fingerprint,
            "tokens_per_batch": self.tokens_per_batch,
            "sequences": self.sequences,
            "residues": self.moments.count,
            "done": self.done.checksums,
            "rd_torch_version": version("rd_torch"),
        }

    def _save(self) -> None:
        """Write everything to the file, if there is one."""
        if self._file is not None:
            _, mean, scatter = self.moments.parts
            tensors = {"mean": mean.cpu(), "scatter": scatter.cpu()}
            metadata = {"facts": json.dumps(self._facts())}
            write_whole(self._file, lambda part: save_file(tensors, part, metadata))
        self._saved = time.monotonic()

    def solve(self, levels: Sequence[str] | None = None, **options: Unpack[SolveOptions]) -> list[Maps]:
        """Solve the stages from the moments.

        Args:
            levels: names of the levels of the chain, by default all.
            **options: options of `solve_stages` and `change_basis`.

        Returns:
            Float64 stages in order, one fewer than levels; before them the basis, if one is asked for.
        """
        return solve_chain(self.moments, self.widths, levels=levels, **options)

    def solve_reconstruction(
        self, stages: Sequence[Maps], predict_from: PredictFrom, levels: Sequence[str] | None = None
    ) -> Reconstructor:
        """Solve for what raw embeddings are reconstructed from.

        Args:
            stages: what `solve` returned.
            predict_from: what the stages predict from.
            levels: names of the levels of the chain, by default all.
        """
        return solve_reconstruction(
            stages, self.moments, self.widths, levels=levels, predict_from=predict_from
        )

    def __enter__(self) -> Self:
        """Return the sums themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock. What is saved stays for the next process, unless no window is counted yet."""
        if self._lock:
            self._lock.release()
        if self._file and not self.done.checksums:
            clear_folder(self._file.parent)


def clear_folder(folder: Path) -> None:
    """Remove the files that a fit left in its folder, and the folder if nothing else is in it."""
    (folder / MOMENTS).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # other files are in the folder
        folder.rmdir()


def record_fit(
    provenance: Mapping[str, Any] | None, counts: Mapping[str, Any], options: SolveOptions
) -> dict[str, Any]:
    """Add to a provenance what was fitted on, and with which options.

    Args:
        provenance: where embeddings and sequences come from.
        counts: how much was summed, in words and numbers.
        options: the options of `solve_stages` and `change_basis` that were chosen.

    Returns:
        The provenance to save with the chain.
    """
    chosen: SolveOptions = {"regressor": SOLVE_DEFAULTS["regressor"], **options}
    return {**(provenance or {}), "fit": {**counts, "solve": chosen}}
