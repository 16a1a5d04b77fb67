"""What `scaling.py` measures: maps from samples of proteins, judged on data sets, kept as they come."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import MAX_RESIDUES
from probes import judge
from scaling_cache import Cache, Scores
from scaling_data import DataSet, digest
from scaling_maps import PLAIN, Affine, Place
from scaling_tables import Record
from tqdm import tqdm

from rd_torch import RunningMoments
from rd_torch.sequences import Fasta, normalized_proteins

PROTOCOL = 1
"""Raised with every change that makes scores of before incomparable."""

SAMPLES = 5


class Work(NamedTuple):
    """One score that is wanted."""

    place: Place
    head: str
    split: int


class Sample(NamedTuple):
    """Sequences that maps are fitted on, in parts whose moments are kept."""

    name: str
    parts: tuple[Sequence[str], ...]

    @property
    def checksum(self) -> str:
        """A digest of all sequences."""
        return digest(sequence for part in self.parts for sequence in part)


class Study:
    """Scores of maps on all data sets, taken from the cache or computed."""

    def __init__(self, cache: Cache, sets: Sequence[DataSet]) -> None:
        self.cache = cache
        self.sets = sets
        self.scores = Scores(cache.folder / "scores.jsonl")

    def moments(self, sample: Sample) -> RunningMoments:
        """Joint moments of a sample."""
        moments = RunningMoments(sum(self.cache.widths.values()))
        for part in sample.parts:
            moments.merge(self.cache.moments(part, sample.name))
        return moments

    def run(self, sample: Sample, maps: Mapping[Place, Affine], heads: Collection[str]) -> list[Record]:
        """Every score of the maps, which come from the sample."""
        records = []
        for data in self.sets:
            keys = {
                Work(place, head, split): self._key(sample, data, Work(place, head, split))
                for place in maps
                for head in heads
                for split in range(len(data.splits))
            }
            missing = {work: key for work, key in keys.items() if key not in self.scores}
            if missing:
                self._judge(data, maps, missing, f"{sample.name}, {data.name}")
            records += [
                Record(
                    sample.name,
                    *work.place,
                    maps[work.place].width,
                    data.name,
                    data.task,
                    work.head,
                    work.split,
                    self.scores[key],
                )
                for work, key in keys.items()
            ]
        return records

    def _key(self, sample: Sample, data: DataSet, work: Work) -> dict[str, Any]:
        """All that a score depends on; the plain backbone's on no fit."""
        return {
            "protocol": PROTOCOL,
            "model": self.cache.fingerprint,
            "fit": "" if work.place.approach == PLAIN else sample.checksum,
            **work.place._asdict(),
            "data": data.name,
            "rows": data.checksum,
            "head": work.head,
            "split": work.split,
        }

    def _judge(
        self, data: DataSet, maps: Mapping[Place, Affine], missing: Mapping[Work, dict[str, Any]], what: str
    ) -> None:
        """Computes and keeps scores."""
        device = self.cache.device
        rows = self.cache.rows(data).to(device)
        labels = torch.from_numpy(data.labels).to(device)
        splits = [tuple(torch.from_numpy(part).to(device) for part in split) for split in data.splits]
        with tqdm(total=len(missing), desc=what, unit="score", leave=False) as bar:
            for place, works in groupby(missing, key=lambda work: work.place):
                features = maps[place](rows)
                for work in works:
                    found = judge(work.head, features, labels, splits[work.split], data.classes, work.split)
                    self.scores.add(missing[work], found)
                    bar.update()


def disjoint_samples(path: Path, without: Collection[str], size: int) -> list[list[str]]:
    """Five samples of a FASTA file's sequences, drawn by chance; none is there twice or among `without`."""
    proteins = normalized_proteins(Fasta(path), max_length=MAX_RESIDUES)
    known = list(dict.fromkeys(each.sequence for each in proteins))
    random.Random(0).shuffle(known)
    known = [sequence for sequence in known if sequence not in without]
    if len(known) < SAMPLES * size:
        raise SystemExit(
            f"expected {SAMPLES} samples of {size:,} sequences in {path}, got {len(known):,} sequences"
        )
    return [known[number * size : (number + 1) * size] for number in range(SAMPLES)]


def cut_at(sequences: Sequence[str], ends: Sequence[int]) -> tuple[Sequence[str], ...]:
    """The sequences up to the last of these rising ends, cut at each: parts that larger samples share."""
    return tuple(sequences[start:end] for start, end in pairwise((0, *ends)))
