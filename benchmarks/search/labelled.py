"""Natural proteins whose family is known from where they come: SCOPe domains and Swiss-Prot entries."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rd_torch.reading import Fasta

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
RESAMPLES = 1_000

SCOPE = re.compile(r"src=SCOPe40 id=\S+/(\w)\.(\d+)\.(\d+)\.(\d+)")
_SWISS_PROT = re.compile(r"id=sp\|\w+\|(\w+)_\w+")


class Labelled(NamedTuple):
    """Proteins of one source, and a label of each.

    Attributes:
        name: What the labels are.
        labels: Label of each protein, by its identifier, in the order of the file.
    """

    name: str
    labels: Mapping[str, str]

    def families(self) -> dict[str, list[str]]:
        """Return the identifiers of the proteins of each label."""
        found: dict[str, list[str]] = {}
        for protein, label in self.labels.items():
            found.setdefault(label, []).append(protein)
        return found

    def with_relatives(self) -> list[str]:
        """Return the identifiers of the proteins whose label another one has too."""
        counts = Counter(self.labels.values())
        return [protein for protein, label in self.labels.items() if counts[label] > 1]


def read_labelled(data: Path, known: Container[str]) -> tuple[list[Labelled], dict[str, np.ndarray]]:
    """Read the families of the natural proteins from the headers of their file.

    They end in class, fold, superfamily and family, as in `>s144732 src=SCOPe40 id=d3pvka_/b.50.1.2`, or in
    the name of a Swiss-Prot entry, as in `>s052068 src=UP:UP000002717 id=sp|Q31KP9|DER_SYNE7`.

    Args:
        data: Folder of the protein data.
        known: Identifiers of the proteins to read, for example a store.

    Returns:
        SCOPe domains by superfamily, the same by fold, and Swiss-Prot entries by the name of the protein; and
        how much of each protein is each amino acid, `(20,)` by its identifier. Kinds of which no two proteins
        are of one family are left out.
    """
    superfamilies: dict[str, str] = {}
    folds: dict[str, str] = {}
    names: dict[str, str] = {}
    composition: dict[str, np.ndarray] = {}
    for protein in Fasta(data / "natural50_train.fasta.xz", identifier="header"):
        identifier = protein.identifier.split()[0]
        if identifier not in known:
            continue
        if domain := SCOPE.search(protein.identifier):
            superfamilies[identifier] = ".".join(domain.groups()[:3])
            folds[identifier] = ".".join(domain.groups()[:2])
        elif entry := _SWISS_PROT.search(protein.identifier):
            names[identifier] = entry[1]
        else:
            continue
        composition[identifier] = np.array([protein.sequence.count(each) for each in LETTERS], float)
        composition[identifier] /= len(protein.sequence)
    sets = [
        Labelled("SCOPe superfamily", superfamilies),
        Labelled("SCOPe fold", folds),
        Labelled("Swiss-Prot name", names),
    ]
    return [each for each in sets if each.with_relatives()], composition


class Split(NamedTuple):
    """Which proteins are indexed, and which are asked for.

    Attributes:
        known: Proteins that are indexed with their labels.
        related: Queries whose label a known protein has.
        strange: Queries of families of which nothing is known.
    """

    known: list[str]
    related: list[str]
    strange: list[str]


def split(labelled: Labelled, seed: int, share: float = 0.2) -> Split:
    """Hold families out, and members of the others.

    Args:
        labelled: The proteins.
        seed: Seed of the draw.
        share: Share of the families that are held out whole. Of every other family each member is asked for
            with this probability, but at least one stays.
    """
    generator = random.Random(seed)
    families = labelled.families()
    held = set(generator.sample(sorted(families), round(share * len(families))))
    strange = [protein for protein, label in labelled.labels.items() if label in held]
    related: set[str] = set()
    for label, members in families.items():
        if label not in held:
            drawn = [member for member in members if generator.random() < share]
            related.update(drawn[: len(members) - 1])
    known = [
        protein for protein, label in labelled.labels.items() if label not in held and protein not in related
    ]
    return Split(known, [protein for protein in labelled.labels if protein in related], strange)


def share_with_interval(families: Sequence[str], right: Sequence[bool], weights: Sequence[float] = ()) -> str:
    """Return the share of answers that are right, with its 95 % interval when families are drawn again.

    Args:
        families: Family of each query.
        right: Whether its answer is right.
        weights: What each query counts; by default all count the same.
    """
    counts = np.asarray(weights if len(weights) else np.ones(len(families)))
    places = np.unique(families, return_inverse=True)[1]
    sums = np.stack([np.bincount(places, counts * np.asarray(right)), np.bincount(places, counts)], axis=1)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    shares = np.divide(*sums[drawn].sum(1).T)
    low, high = np.quantile(shares, (0.025, 0.975))
    return f"{np.divide(*sums.sum(0)):.3f} [{low:.3f}, {high:.3f}]"
