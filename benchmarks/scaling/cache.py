"""What is kept between runs: raw embeddings of all layers side by side, moments, choices, scores.

Everything lies in a folder named by the fingerprint of the model, so that one cache serves several models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import rd_torch
from benchmarks.scaling.data import DataSet, digest
from benchmarks.scaling.layers import costs_of, side_by_side
from rd_torch.backbone import Packing, is_real, is_residue, run_backbones
from rd_torch.batching import plan_batches, run_batches
from rd_torch.disk import write_whole


class Cache:
    """Embeddings and moments of one model, computed where they are not kept yet.

    Args:
        folder: Folder of the caches of all models.
        model: The chain; its maps are of no account.
        most: Number of layers of a backbone to take at the most.
        final_norm: Whether each backbone's last LayerNorm acts on middle layers too.

    Attributes:
        widths: Widths of raw embeddings by layer, in the order in which they stand side by side.
        costs: Number of parameters that run up to each layer, by layer.
    """

    def __init__(self, folder: Path, model: rd_torch.RDModel, most: int, final_norm: bool = True) -> None:
        self.model = side_by_side(model, most, final_norm).prepare_inference()
        self.widths = {name: backbone.embed_dim for name, backbone in self.model.family().items()}
        self.costs = costs_of(self.model)
        self.folder = folder / self.model.fingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = model.device

    def rows(self, data: DataSet) -> Tensor:
        """Return `(rows, widths together)` raw embeddings of a data set, side by side, in float32.

        The store is written in windows: what a kill leaves is taken up again.

        Raises:
            SystemExit: If a sequence takes more memory than there is.
        """
        path = self.folder / f"{data.pool}-{digest(data.sequences)}.h5"
        if not path.exists():
            proteins = ((str(number), sequence) for number, sequence in enumerate(data.sequences))
            with _bar(data.sequences, f"embedding {data.name}") as bar:
                failed = rd_torch.embed_to_store(
                    self.model,
                    proteins,
                    path,
                    pool=data.pool,
                    progress=lambda residues, before: bar.update(residues),
                )
            if failed:
                path.unlink()
                raise SystemExit(
                    f"expected memory for every sequence of {data.name}, got none for {len(failed):,}"
                )
        with rd_torch.open_store(path) as store:
            rows = store.read(slice(None), as_torch=True)
        return (
            torch.cat([torch.as_tensor(each) for each in rows])
            if isinstance(rows, list)
            else torch.as_tensor(rows)
        )

    def moments(self, sequences: Sequence[str], name: str) -> rd_torch.RunningMoments:
        """Return joint moments of the residues of sequences, on the CPU."""
        path = self.folder / f"moments-{digest(sequences)}.pt"
        if not path.exists():
            moments = rd_torch.RunningMoments(sum(self.widths.values()), self.device)
            with _bar(sequences, f"moments of {name}") as bar:
                for rows in self._residues(sequences):
                    moments.update(rows)
                    bar.update(len(rows))
            write_whole(path, partial(torch.save, moments.parts))
        return rd_torch.RunningMoments.of(*torch.load(path, map_location="cpu"))

    @torch.inference_mode()
    def _residues(self, sequences: Sequence[str]) -> Iterator[Tensor]:
        """Yield `(residues, widths together)` raw embeddings of batches."""
        family = self.model.family()
        budget, device = plan_batches(family.values(), None)
        alphabet, final_norm = self.model.alphabet, self.model.config.final_norm

        def compute(tokens: Tensor) -> Tensor:
            """Return raw embeddings of a batch's residues."""
            packing = Packing.of(is_real(tokens, alphabet))
            raw = run_backbones(family, tokens, packing, final_norm=final_norm)
            return torch.cat(list(raw.values()), dim=1)[packing.pack(is_residue(tokens, alphabet))]

        for batch in run_batches(compute, sequences, alphabet, budget, device):
            yield batch.result


def _bar(sequences: Sequence[str], what: str) -> tqdm[NoReturn]:
    """Return a progress bar over residues."""
    return tqdm(total=sum(map(len, sequences)), unit="residue", unit_scale=True, desc=what, leave=False)


class Kept:
    """What was found, by everything that it depends on, kept line by line as it comes.

    Args:
        path: A file of JSON lines; one that was cut off in the middle of its last line is mended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._found[_name(entry["key"])] = entry["found"]

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return _name(key) in self._found

    def __getitem__(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return self._found[_name(key)]

    def add(self, key: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Keep what was found for a key."""
        self._found[_name(key)] = found
        with self.path.open("a") as handle:
            handle.write(json.dumps({"key": dict(key), "found": found}) + "\n")


def _name(key: Mapping[str, Any]) -> str:
    """Return one text for equal keys."""
    return json.dumps(key, sort_keys=True)
