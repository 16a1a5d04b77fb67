"""The measurement itself: embeddings by maps from samples of proteins are judged on data sets.

Choices and scores are kept as they come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from benchmarks.proteins import MAX_RESIDUES
from benchmarks.scaling.approaches import EACH, LABELS, Approach, choose_without_labels
from benchmarks.scaling.cache import Cache, Kept
from benchmarks.scaling.criteria import Chosen, choose_apart, choose_greedily
from benchmarks.scaling.data import DataSet, digest
from benchmarks.scaling.maps import PLAIN, Recipe, Solver
from benchmarks.scaling.probes import NEAREST, Rows, Scores, expected_error, judge
from benchmarks.scaling.records import Record
from rd_torch import RunningMoments
from rd_torch.reading import Fasta
from rd_torch.sequences import normalize_proteins

PROTOCOL = 2
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
    """Approaches, the sample that their maps come from, and what solves these."""

    sample: Sample
    solver: Solver
    approaches: Sequence[Approach]


class Work(NamedTuple):
    """One score that is wanted."""

    fit: Fit
    approach: str
    level: str
    recipe: Recipe
    split: int
    head: str


class Study:
    """Scores of approaches on all data sets, taken from the cache or computed."""

    def __init__(self, cache: Cache, sets: Sequence[DataSet]) -> None:
        self.cache = cache
        self.sets = sets
        self.scores = Kept(cache.folder / "scores.jsonl")
        self.choices = Kept(cache.folder / "choices.jsonl")

    def solver(self, sample: Sample) -> Solver:
        """Return what solves maps from the joint moments of a sample."""
        moments = RunningMoments(sum(self.cache.widths.values()))
        for part in sample.parts:
            moments.merge(self.cache.moments(part, sample.name))
        return Solver(moments, self.cache.widths)

    def run(self, fits: Sequence[Fit]) -> list[list[Record]]:
        """Return every score of the approaches, fit by fit."""
        records: list[list[Record]] = [[] for _ in fits]
        for data in self.sets:
            known = _Known(partial(self.cache.rows, data), data, self.cache.device)
            wanted = [list(self._works(fit, known)) for fit in fits]
            keys = [[self._key(data, work) for work in works] for works in wanted]
            missing = {
                str(key): (work, key)
                for work, key in zip(chain(*wanted), chain(*keys), strict=True)
                if key not in self.scores
            }
            self._judge(known, list(missing.values()))
            for found, works, its_keys in zip(records, wanted, keys, strict=True):
                found += [self._record(data, work, key) for work, key in zip(works, its_keys, strict=True)]
        return records

    def _works(self, fit: Fit, known: _Known) -> Iterator[Work]:
        """Yield the scores that are wanted of a fit on a data set, recipe by recipe."""
        for split in range(len(known.data.splits)):
            for approach in fit.approaches:
                chosen = () if approach.choice == EACH else self.chosen(fit, approach, known, split)
                for level, recipe in approach.recipes(fit.solver, chosen).items():
                    for head in approach.heads:
                        if head != NEAREST or known.data.pool == "mean":  # residues are too many for it
                            yield Work(fit, approach.name, level, recipe, split, head)

    def chosen(self, fit: Fit, approach: Approach, known: _Known, split: int) -> Chosen:
        """Return the layers that an approach takes; labels are seen of rows that teach alone."""
        if approach.choice != LABELS:
            return choose_without_labels(approach.choice, fit.solver)
        kind = approach.kind if approach.greedy else PLAIN
        key = {**self._about(fit, known.data, split), "kind": kind}
        if key not in self.choices:
            choose = choose_greedily if approach.greedy else choose_apart
            taught, _ = known.data.splits[split]
            worth = partial(self._worth, fit.solver, kind, known, torch.from_numpy(taught))
            self.choices.add(key, {"layers": choose(fit.solver.widths, worth)})
        return tuple(self.choices[key]["layers"])

    @staticmethod
    def _worth(solver: Solver, kind: str, known: _Known, taught: Tensor, chosen: Chosen) -> float:
        """Return how small an error the rows that teach let expect of a chain of layers."""
        recipe = solver.recipe(kind if len(chosen) > 1 else PLAIN, chosen)
        return -expected_error(known.part(solver, recipe, taught), known.data.classes)

    def _about(self, fit: Fit, data: DataSet, split: int) -> dict[str, Any]:
        """Return what a choice and a score depend on."""
        return {
            "protocol": PROTOCOL,
            "fit": fit.sample.checksum,
            "data": data.name,
            "rows": data.checksum,
            "split": split,
        }

    def _key(self, data: DataSet, work: Work) -> dict[str, Any]:
        """Return all that a score depends on; a plain backbone as it is depends on no fit."""
        about = self._about(work.fit, data, work.split)
        if work.recipe.kind == PLAIN and not work.recipe.scale:
            about["fit"] = ""
        recipe = {**work.recipe._asdict(), "layers": list(work.recipe.layers)}
        return {**about, **recipe, "head": work.head}

    def _record(self, data: DataSet, work: Work, key: Mapping[str, Any]) -> Record:
        """Return a score that is kept, with what it is of."""
        return Record(
            fit=work.fit.sample.name,
            approach=work.approach,
            level=work.level,
            width=work.recipe.width,
            cost=sum(self.cache.costs[layer] for layer in work.recipe.layers),
            layers=work.recipe.layers,
            data=data.name,
            task=data.task,
            head=work.head,
            split=work.split,
            scores=self.scores[key],
        )

    def _judge(self, known: _Known, missing: Sequence[tuple[Work, dict[str, Any]]]) -> None:
        """Compute scores of a data set, and keep them.

        Small heads gain nothing from several threads: on CPUs as many processes judge, with one each.
        """
        if not missing:
            return
        groups = [list(group) for _, group in groupby(sorted(missing, key=_embedding_of), key=_embedding_of)]
        workers = torch.get_num_threads() if self.cache.device.type == "cpu" else 1
        with tqdm(total=len(missing), desc=known.data.name, unit="score", leave=False) as bar:
            found = Parallel(workers, return_as="generator")(self._tasks(known, groups))
            for group, scores in zip(groups, found, strict=True):
                for (_, key), each in zip(group, scores, strict=True):
                    self.scores.add(key, each)
                bar.update(len(group))

    @staticmethod
    def _tasks(known: _Known, groups: Sequence[Sequence[tuple[Work, dict[str, Any]]]]) -> Iterator[Any]:
        """Yield what joblib is to call for each embedding: all heads that judge it."""
        for group in groups:
            work, _ = group[0]
            parts = map(torch.from_numpy, known.data.splits[work.split])
            taught, judged = (known.part(work.fit.solver, work.recipe, part) for part in parts)
            heads = [each.head for each, _ in group]
            yield delayed(_judge_by)(heads, taught, judged, known.data.classes, work.split)


def _judge_by(heads: Sequence[str], taught: Rows, judged: Rows, classes: int, seed: int) -> list[Scores]:
    """Return the scores of several heads on the same rows."""
    return [judge(head, taught, judged, classes, seed) for head in heads]


def _embedding_of(entry: tuple[Work, dict[str, Any]]) -> tuple[str, int, Recipe]:
    """Return what embedding a score is of."""
    work, _ = entry
    return work.fit.sample.checksum, work.split, work.recipe


class _Known:
    """A data set with its raw embeddings, which are read when they are needed first."""

    def __init__(self, read: Callable[[], Tensor], data: DataSet, device: torch.device) -> None:
        self.data = data
        self._read = read
        self._device = device
        self._labels = torch.from_numpy(data.labels)

    @cached_property
    def rows(self) -> Tensor:
        """Return raw embeddings of all layers side by side."""
        return self._read()

    def part(self, solver: Solver, recipe: Recipe, part: Tensor) -> Rows:
        """Return features and labels of some rows."""
        features = solver.map_of(recipe)(self.rows, part, self._device)
        return Rows(features, self._labels[part].to(self._device))


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
