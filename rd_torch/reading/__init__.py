"""Read the sequences that people have, in files, pipes and containers of Python, or refuse them."""

from __future__ import annotations

from rd_torch.reading.items import entries_of, sequences_of
from rd_torch.reading.proteins import Fasta, Proteins
from rd_torch.reading.rows import Cells, read_cells
from rd_torch.reading.tables import delimiter_of, find_sequence_column
from rd_torch.reading.text import open_source

__all__ = [
    "Cells",
    "Fasta",
    "Proteins",
    "delimiter_of",
    "entries_of",
    "find_sequence_column",
    "open_source",
    "read_cells",
    "sequences_of",
]
