"""The measurement itself: maps from samples of proteins are judged on data sets.

Scores are kept as they come.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.proteins import MAX_RESIDUES
from benchmarks.scaling.cache import Cache, Scores
from benchmarks.scaling.data import DataSet, digest
from benchmarks.scaling.maps import PLAIN, Affine, Place
from benchmarks.scaling.probes import Rows, judge
from benchmarks.scaling.tables import Record
from rd_torch import RunningMoments
from rd_torch.reading import Fasta
from rd_torch.sequences import normalize_proteins

PROTOCOL = 1
"""Number to raise with every change that makes earlier scores incomparable."""

SAMPLES = 5


@dataclass(frozen=True)
class Sample:
    """Sequences that maps are fitted on, in parts whose moments are kept."""

    name: str
    parts: tuple[Sequence[str], ...]

    @cached_property
    def checksum(self) -> str:
        """Return a digest of all sequences."""
        return digest(sequence for part in self.parts for sequence in part)


@dataclass(frozen=True, eq=False)
class Fit:
    """Maps, and the sample that they come from."""

    sample: Sample
    maps: Mapping[Place, Affine]


class Work(NamedTuple):
    """One score that is wanted."""

    fit: Fit
    place: Place
    split: int
    head: str


class Study:
    """Scores of maps on all data sets, taken from the cache or computed."""

    def __init__(self, cache: Cache, sets: Sequence[DataSet]) -> None:
        self.cache = cache
        self.sets = sets
        self.scores = Scores(cache.folder / "scores.jsonl")

    def moments(self, sample: Sample) -> RunningMoments:
        """Return the joint moments of a sample."""
        moments = RunningMoments(sum(self.cache.widths.values()))
        for part in sample.parts:
            moments.merge(self.cache.moments(part, sample.name))
        return moments

    def run(self, fits: Sequence[Fit], heads: Sequence[str]) -> list[list[Record]]:
        """Return every score of the maps, fit by fit."""
        records: list[list[Record]] = [[] for _ in fits]
        for data in self.sets:
            wanted = [
                [Work(fit, *rest) for rest in product(fit.maps, range(len(data.splits)), heads)]
                for fit in fits
            ]
            keys = [[self._key(data, work) for work in works] for works in wanted]
            missing = [
                (work, key)
                for work, key in zip(chain(*wanted), chain(*keys), strict=True)
                if key not in self.scores
            ]
            if missing:
                self._judge(data, missing)
            for found, works, its_keys in zip(records, wanted, keys, strict=True):
                found += [self._record(data, work, key) for work, key in zip(works, its_keys, strict=True)]
        return records

    def _key(self, data: DataSet, work: Work) -> dict[str, Any]:
        """Return all that a score depends on; that of the plain backbone depends on no fit."""
        return {
            "protocol": PROTOCOL,
            "model": self.cache.fingerprint,
            "fit": "" if work.place.approach == PLAIN else work.fit.sample.checksum,
            **work.place._asdict(),
            "data": data.name,
            "rows": data.checksum,
            "head": work.head,
            "split": work.split,
        }

    def _record(self, data: DataSet, work: Work, key: Mapping[str, Any]) -> Record:
        """Return a score that is kept, with what it is of."""
        width = work.fit.maps[work.place].width
        about = (work.fit.sample.name, *work.place, width, data.name, data.task, work.head, work.split)
        return Record(*about, self.scores[key])

    def _judge(self, data: DataSet, missing: Sequence[tuple[Work, dict[str, Any]]]) -> None:
        """Compute scores of a data set, and keep them."""
        rows, labels = self.cache.rows(data), torch.from_numpy(data.labels)
        bar = tqdm(missing, desc=data.name, unit="score", leave=False)
        for (fit, place, split), group in groupby(bar, key=lambda entry: entry[0][:3]):
            taught, judged = (
                Rows(fit.maps[place](rows[part].to(self.cache.device)), labels[part].to(self.cache.device))
                for part in map(torch.from_numpy, data.splits[split])
            )
            for work, key in group:
                self.scores.add(key, judge(work.head, taught, judged, data.classes, split))


def disjoint_samples(path: Path, without: Collection[str], size: int) -> list[list[str]]:
    """Draw five samples of a FASTA file's sequences by chance; none is there twice or among `without`.

    Raises:
        SystemExit: If the file has too few sequences.
    """
    proteins = normalize_proteins(Fasta(path), max_length=MAX_RESIDUES)
    known = list(dict.fromkeys(each.sequence for each in proteins))
    random.Random(0).shuffle(known)
    known = [sequence for sequence in known if sequence not in without]
    if len(known) < SAMPLES * size:
        raise SystemExit(
            f"expected {SAMPLES} samples of {size:,} sequences in {path}, got {len(known):,} sequences"
        )
    return [known[number * size : (number + 1) * size] for number in range(SAMPLES)]


def cut_at(sequences: Sequence[str], ends: Sequence[int]) -> tuple[Sequence[str], ...]:
    """Return the sequences up to the last of these rising ends, cut at each.

    Larger samples share these parts with smaller ones.
    """
    return tuple(sequences[start:end] for start, end in pairwise((0, *ends)))
