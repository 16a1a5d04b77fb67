"""Families that are made: mutated copies of domains, whose relation is known because it was made."""

from __future__ import annotations

import random
from pathlib import Path

import rd_torch
from benchmarks.search.labelled import SCOPE, Labelled
from rd_torch.reading import Fasta

SHORTEST, LONGEST = 50, 300
"""Numbers of residues between which a domain lies."""

LEAST_CHANGED, MOST_CHANGED = 0.05, 0.5
"""Shares of residues between which a copy differs from its domain."""


def write_copies(model: rd_torch.RDModel, data: Path, path: Path, families: int, copies: int) -> Labelled:
    """Embed mutated copies of SCOPe domains into a store.

    Of a superfamily one domain is copied at the most. Residues at random sites are drawn anew from all
    residues of the domains. The share of sites is drawn for each copy.

    Args:
        model: The model.
        data: Folder of the protein data.
        path: The store to write.
        families: Number of domains that are copied.
        copies: Number of copies of each.

    Returns:
        The copies, and the domain of each.
    """
    generator = random.Random(0)
    domains: dict[str, tuple[str, str]] = {}
    for protein in Fasta(data / "natural50_train.fasta.xz", identifier="header"):
        domain = SCOPE.search(protein.identifier)
        if domain and SHORTEST <= len(protein.sequence) <= LONGEST:
            superfamily = ".".join(domain.groups()[:3])
            domains.setdefault(superfamily, (protein.identifier.split()[0], protein.sequence))
    chosen = generator.sample(list(domains.values()), min(families, len(domains)))
    letters = "".join(sequence for _, sequence in chosen)
    proteins, labels = [], {}
    for name, sequence in chosen:
        for number in range(copies):
            changed = generator.uniform(LEAST_CHANGED, MOST_CHANGED)
            residues = list(sequence)
            for place in generator.sample(range(len(residues)), round(changed * len(residues))):
                residues[place] = generator.choice(letters)
            proteins.append((f"{name}_{number}", "".join(residues)))
            labels[f"{name}_{number}"] = name
    rd_torch.embed_to_store(model, proteins, path)
    return Labelled("domain of mutated copies", labels)
