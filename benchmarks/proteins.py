"""The natural proteins that the benchmarks read."""

from __future__ import annotations

from pathlib import Path

from rd_torch.letters import Corrections
from rd_torch.reading import Fasta
from rd_torch.sequences import normalize

MAX_RESIDUES = 1022
"""Number of residues at which proteins are cut: ESM-2 was trained on 1,024 tokens."""


def natural_proteins(data: Path) -> list[str]:
    """Return the validation proteins in the order of their file, cut at 1,022 residues.

    Args:
        data: Folder of the protein data.
    """
    changed = Corrections()
    return [
        normalize(protein, changed, max_length=MAX_RESIDUES).sequence
        for protein in Fasta(data / "natural50_valid.fasta.xz")
    ]
