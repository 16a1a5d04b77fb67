"""What comes in: files, pipes and Python's containers, each read as what was meant, or refused."""

from __future__ import annotations

from rd_torch.reading.fasta import naming
from rd_torch.reading.items import entries_of, sequences_of
from rd_torch.reading.proteins import Fasta, Proteins

__all__ = ["Fasta", "Proteins", "entries_of", "naming", "sequences_of"]
