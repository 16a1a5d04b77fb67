"""Read the sequences that people have, in files, pipes and containers of Python, or refuse them."""

from __future__ import annotations

from rd_torch.reading.items import entries_of, sequences_of
from rd_torch.reading.proteins import Fasta, Proteins
from rd_torch.reading.rows import Cells, read_cells, read_rows
from rd_torch.reading.tables import find_sequence_column

__all__ = [
    "Cells",
    "Fasta",
    "Proteins",
    "entries_of",
    "find_sequence_column",
    "read_cells",
    "read_rows",
    "sequences_of",
]
