"""What is kept between runs: raw embeddings of all layers side by side, moments, choices, scores.

Everything lies in a folder named by the fingerprint of the layers, so that one cache serves several models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import rd_torch
from benchmarks.scaling.data import DataSet, digest
from benchmarks.scaling.layers import costs_of, spread, stated
from rd_torch.candidates import Candidates
from rd_torch.disk import write_whole

CHUNK = 250
"""Number of sequences whose raw embeddings are one file. What a kill leaves is taken up behind the last."""


class Cache:
    """Embeddings and moments of the layers of one family, computed where they are not kept yet.

    Args:
        folder: Folder of the caches of all models.
        model: A chain of last layers; its maps are of no account.
        most: Number of layers of a backbone to take at the most.
        final_norm: Whether each backbone's last LayerNorm acts on middle layers too.

    Attributes:
        widths: Widths of raw embeddings by layer, in the order in which they stand side by side.
        costs: Number of parameters that run up to each layer, by layer.
    """

    def __init__(self, folder: Path, model: rd_torch.RDModel, most: int, final_norm: bool = True) -> None:
        family = model.family()
        layers = {name: spread(backbone.num_layers, most) for name, backbone in family.items()}
        self._candidates = Candidates.of(family, layers=layers, final_norm=final_norm)
        named = {stated(name, backbone): backbone for name, backbone in self._candidates.family.items()}
        self.widths = {name: backbone.embed_dim for name, backbone in named.items()}
        self.costs = costs_of(named)
        self.folder = folder / self._candidates.summands().fingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = model.device

    def rows(self, data: DataSet) -> Tensor:
        """Return `(rows, widths together)` raw embeddings of a data set, side by side, in float32."""
        parts = [data.sequences[start : start + CHUNK] for start in range(0, len(data.sequences), CHUNK)]
        with _bar(data.sequences, f"embedding {data.name}") as bar:
            return torch.cat([self._rows(part, data.pool, bar) for part in parts])

    def _rows(self, sequences: Sequence[str], pool: str, bar: tqdm[NoReturn]) -> Tensor:
        """Return raw embeddings of some sequences: their means, or all residues."""
        path = self.folder / f"{pool}-{digest(sequences)}.pt"
        if path.exists():
            return torch.load(path)
        found: dict[int, Tensor] = {}
        budget, _ = self._candidates.plan(None)
        for indices, rows, owners in self._candidates.embed(sequences, budget):
            own = rows.cpu().split(owners.bincount(minlength=len(indices)).tolist())
            found |= (
                zip(indices, own, strict=True)
                if pool == "none"
                else zip(indices, map(_mean, own), strict=True)
            )
            bar.update(len(rows))
        kept = torch.cat([found[number].float() for number in range(len(sequences))])
        write_whole(path, partial(torch.save, kept))
        return kept

    def moments(self, sequences: Sequence[str], name: str) -> rd_torch.RunningMoments:
        """Return joint moments of the residues of sequences, on the CPU."""
        path = self.folder / f"moments-{digest(sequences)}.pt"
        if not path.exists():
            budget, device = self._candidates.plan(None)
            moments = rd_torch.RunningMoments(sum(self.widths.values()), device)
            with _bar(sequences, f"moments of {name}") as bar:
                self._candidates.add_moments(
                    moments, sequences, budget, lambda residues, before: bar.update(residues)
                )
            write_whole(path, partial(torch.save, moments.parts))
        return rd_torch.RunningMoments.of(*torch.load(path, map_location="cpu"))


def _mean(rows: Tensor) -> Tensor:
    """Return the `(1, width)` mean of rows, summed in float64."""
    return rows.double().mean(0, keepdim=True)


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
