"""What is kept between runs: raw embeddings of all backbones side by side, moments, scores.

Everything lies in a folder named by the fingerprint of the model, so that one cache serves several models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import rd_torch
from benchmarks.scaling.data import DataSet, digest
from rd_torch.candidates import Candidates
from rd_torch.disk import write_whole


def side_by_side(model: rd_torch.RDModel) -> rd_torch.RDModel:
    """Return the chain of the same backbones whose embedding is all raw embeddings side by side.

    Its stages predict nothing and add every direction as it is: `[x, y]`.
    """
    family = model.family()
    stages, width = [], 0
    for smaller, larger in pairwise(family.values()):
        width += smaller.embed_dim
        q = larger.embed_dim
        stages.append(rd_torch.Stage(torch.zeros(width, q), torch.zeros(q), torch.zeros(q), torch.eye(q)))
    device = next(model.backbones.parameters()).device
    return rd_torch.RDModel(family, stages).eval().to(device)


class Cache:
    """Embeddings and moments of one model, computed where they are not kept yet.

    Args:
        folder: Folder of the caches of all models.
        model: The chain; its maps are of no account.
    """

    def __init__(self, folder: Path, model: rd_torch.RDModel) -> None:
        self.model = side_by_side(model).prepare_inference()
        self.fingerprint = self.model.fingerprint()
        self.folder = folder / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = next(self.model.backbones.parameters()).device
        self.widths = {name: backbone.embed_dim for name, backbone in self.model.family().items()}

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
            candidates = Candidates.of(self.model.family())
            budget, device = candidates.plan(None)
            moments = rd_torch.RunningMoments(sum(self.widths.values()), device)
            with _bar(sequences, f"moments of {name}") as bar:
                candidates.add_moments(
                    moments,
                    sequences,
                    budget,
                    lambda residues, before: bar.update(residues),
                )
            write_whole(path, partial(torch.save, moments.parts))
        return rd_torch.RunningMoments.of(*torch.load(path, map_location="cpu"))


def _bar(sequences: Sequence[str], what: str) -> tqdm[NoReturn]:
    """Return a progress bar over residues."""
    return tqdm(total=sum(map(len, sequences)), unit="residue", unit_scale=True, desc=what, leave=False)


class Scores:
    """Scores by everything that they depend on, kept line by line as they come.

    Args:
        path: A file of JSON lines; one that was cut off in the middle of its last line is mended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[str, dict[str, float]] = {}
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._scores[_name(entry["key"])] = entry["scores"]

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return _name(key) in self._scores

    def __getitem__(self, key: Mapping[str, Any]) -> dict[str, float]:
        return self._scores[_name(key)]

    def add(self, key: Mapping[str, Any], scores: dict[str, float]) -> None:
        """Keep the scores of a key."""
        self._scores[_name(key)] = scores
        with self.path.open("a") as handle:
            handle.write(json.dumps({"key": dict(key), "scores": scores}) + "\n")


def _name(key: Mapping[str, Any]) -> str:
    """Return one text for equal keys."""
    return json.dumps(key, sort_keys=True)
