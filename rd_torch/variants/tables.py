"""`VariantTable`: the variants of a table, row by row, as ProteinGym, MaveDB and others write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from rd_torch.reading import read_rows
from rd_torch.variants.notation import Written, read_notation
from rd_torch.variants.variant import (
    Variant,
    all_single,
    compare_sequence,
    find_numbering,
    name_of,
    place_variant,
)

MUTATION_NAMES: Final = frozenset(
    ("mutant", "mutants", "mutation", "mutations", "variant", "variants", "hgvs_pro", "hgvsp", "hgvs_p",
     "protein_variant", "aa_substitution", "aa_substitutions", "aa_mutation", "aa_mutations", "substitution",
     "substitutions", "aa_change", "protein_change")
)  # fmt: skip
"""Names of columns that have variants, in lower case with `_` for blanks."""

MUTATED_SEQUENCE: Final = "mutated_sequence"
"""ProteinGym's column with the whole sequence of each variant."""

_SEQUENCE_NAMES: Final = (MUTATED_SEQUENCE, "mutant_sequence", "sequence", "mutated_seq", "mutant_seq")
_ROWS_FOR_HINT: Final = 2_000


class VariantRow(NamedTuple):
    """A row of a table.

    Attributes:
        line: its line, or its number in a Parquet file, from 1.
        cells: its cells.
        name: the variant as it is written; its usual name where the table has whole sequences.
        variant: the variant; None where it cannot be read.
        fault: why it cannot be read; empty where it can.
    """

    line: int
    cells: Sequence[str]
    name: str
    variant: Variant | None
    fault: str = ""


class VariantTable:
    """The variants of a wild type in a table, read anew by each iteration.

    Tables are text with commas, tabs or semicolons between columns, packed or not, or Parquet. Where a table
    has both variants and ProteinGym's `mutated_sequence`, each row's two must agree.

    Args:
        path: the table.
        wild_type: residues of the wild type.
        mutation_column: name of the column with the variants, in a notation that `read_notation` describes;
            by default the only one that can be meant.
        sequence_column: name of the column with whole mutated sequences, which is read in place of variants;
            by default the only one that can be meant where no column has variants.
        first: the number that the table has for the first residue of the wild type.

    Attributes:
        header: names of all columns.
        reads: name of the column that is read.

    Raises:
        FileNotFoundError: where there is no table, or a pipe, which cannot be read twice.
        ValueError: for a file that is no table, and columns that are not there or cannot be guessed.

    Examples:
        >>> with open("assay.csv", "w") as file:
        ...     print("mutant,score", "M1A,0.5", "K2R:V3I,0.9", "A1G,0.1", sep=chr(10), file=file)
        >>> rows = list(rd_torch.variants.VariantTable("assay.csv", "MKV"))
        >>> [row.variant.sites for row in rows if row.variant]
        [(0,), (1, 2)]
        >>> rows[2].fault
        "expected M at position 1, where the wild type has it, got A: 'A1G'"
    """

    def __init__(
        self,
        path: str | Path,
        wild_type: str,
        *,
        mutation_column: str | None = None,
        sequence_column: str | None = None,
        first: int = 1,
    ) -> None:
        self.path, self.wild_type, self.first = Path(path), wild_type, first
        if not self.path.is_file():
            got = "a pipe: write it to a file first" if self.path.exists() else "nothing there"
            raise FileNotFoundError(f"expected a table of variants at {path}, got {got}")
        _, self.header = next(read_rows(self.path))
        self._by_sequence, self.reads = self._choose(mutation_column, sequence_column)
        self._place = self.header.index(self.reads)
        self._beside = None
        if not self._by_sequence and MUTATED_SEQUENCE in self.header:
            self._beside = self.header.index(MUTATED_SEQUENCE)

    def _choose(self, mutation_column: str | None, sequence_column: str | None) -> tuple[bool, str]:
        """Return whether whole sequences are read, and from which column."""
        listed = ", ".join(map(repr, self.header))
        if len(set(self.header)) < len(self.header):
            raise ValueError(f"expected columns of different names, got {listed} in {self.path}")
        if mutation_column is not None and sequence_column is not None:
            raise ValueError("expected a column of variants or one of mutated sequences, got both")
        for named, by_sequence in ((mutation_column, False), (sequence_column, True)):
            if named is not None:
                if named not in self.header:
                    raise ValueError(f"expected a column {named!r}, got {listed} in {self.path}")
                return by_sequence, named
        spelled = {name: name.strip().lower().replace(" ", "_").replace("-", "_") for name in self.header}
        for names, by_sequence in ((MUTATION_NAMES, False), (_SEQUENCE_NAMES, True)):
            meant = [name for name in self.header if spelled[name] in names]
            if len(meant) == 1:
                return by_sequence, meant[0]
            if meant:
                raise ValueError(
                    f"expected one column of variants, got {' and '.join(map(repr, meant))} in {self.path}, "
                    "which can both be meant: name it with --mutation-column or --sequence-column"
                )
        raise ValueError(
            f"expected a column of variants such as 'mutant' or 'hgvs_pro', got {listed} in {self.path}: "
            "name it with --mutation-column, or --sequence-column where it has whole mutated sequences"
        )

    def __iter__(self) -> Iterator[VariantRow]:
        """Read the rows.

        Yields:
            Each row; one that cannot be read has a fault.

        Raises:
            ValueError: for a table that does not read any further.
        """
        rows, reference = read_rows(self.path), ""
        next(rows)
        for line, cells in rows:
            if len(cells) != len(self.header):
                fault = f"expected {len(self.header):,} columns, as in the header row, got {len(cells):,}"
                yield VariantRow(line, cells, f"line {line}", None, fault)
                continue
            text = cells[self._place].strip()
            try:
                written = Written(()) if self._by_sequence else read_notation(text)
                reference = reference or written.reference
                if written.reference not in ("", reference):
                    raise ValueError(
                        f"expected a variant of {reference}, as in rows before, got one of "
                        f"{written.reference}: {text!r}"
                    )
                variant = self._read(text, written, cells)
            except ValueError as error:
                yield VariantRow(line, cells, text[:80] or f"line {line}", None, str(error))
            else:
                yield VariantRow(line, cells, variant.name, variant)

    def _read(self, text: str, written: Written, cells: Sequence[str]) -> Variant:
        """Return the variant of a row; raise a ValueError where it is none of the wild type."""
        if self._by_sequence:
            variant = compare_sequence(text, self.wild_type, "", self.first)
            return variant._replace(name=name_of(variant.substitutions, self.first))
        variant = place_variant(text, written, self.wild_type, self.first)
        if self._beside is not None:
            beside = compare_sequence(cells[self._beside], self.wild_type, text, self.first)
            if beside.substitutions != variant.substitutions:
                raise ValueError(
                    f"expected the sequence in {MUTATED_SEQUENCE!r} to be that of {text!r}, got that of "
                    f"{name_of(beside.substitutions, self.first)!r}"
                )
        return variant

    def hint(self) -> str:
        """Return by which numbering the first rows fit, where they do not fit by the given one; else ""."""
        written = []
        for row in islice(self, 0 if self._by_sequence else _ROWS_FOR_HINT):
            try:
                written.append(read_notation(row.cells[self._place]).changes)
            except (ValueError, IndexError):
                continue
        first = find_numbering(written, self.wild_type, self.first)
        if first is None:
            return ""
        return (
            f": they fit where the wild type's first residue has number {first}, which is --offset "
            f"{first - 1} without --zero-based"
        )


class AllSingle:
    """The table of all single substitutions of a wild type by the twenty amino acids, in one column.

    Args:
        wild_type: residues of the wild type.
        first: number of its first residue.

    Attributes:
        header: names of its columns.
    """

    path: Path | None = None

    def __init__(self, wild_type: str, first: int = 1) -> None:
        self.wild_type, self.first, self.header = wild_type, first, ["mutant"]

    def __iter__(self) -> Iterator[VariantRow]:
        """Make the rows."""
        for number, variant in enumerate(all_single(self.wild_type, self.first), start=1):
            yield VariantRow(number, [variant.name], variant.name, variant)

    def hint(self) -> str:
        """Return an empty string, because all rows fit."""
        return ""


def variants_in(table: VariantTable | AllSingle, rows: Iterable[VariantRow]) -> Iterator[Variant]:
    """Yield the variants of a table that can be read.

    Args:
        table: the table.
        rows: its rows.

    Raises:
        ValueError: at the end, where there was none, or where rows fit by another numbering and not by the
            given one, by which some letters fit by chance alone.
    """
    count, sound, first = 0, 0, ""
    for row in rows:
        count += 1
        if row.variant is None:
            first = first or f"{row.fault} (line {row.line:,})"
        else:
            sound += 1
            yield row.variant
    hint = table.hint() if sound < count else ""
    if hint or not sound:
        got = f"got {sound:,} in {count:,} rows; the first without says: {first}" if count else "got no row"
        raise ValueError(f"expected variants of the wild type in {table.path}, {got}{hint}")
