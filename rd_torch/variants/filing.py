"""`score_table`: a table of variants in, the same table with the scores of each level out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from rd_torch.choices import Scoring
from rd_torch.disk import LOCK, part_folder, require_folder, take_lock, write_whole
from rd_torch.model import RDModel
from rd_torch.store import Failure, failure_list, write_failures
from rd_torch.variants.asking import LanguageModel, Progress
from rd_torch.variants.heatmap import Landscape, plot_landscapes, require_picture
from rd_torch.variants.scoring import Score, ask_for_scores, count_questions, groups_of, needs_of
from rd_torch.variants.tables import AllSingle, VariantRow, VariantTable, variants_in
from rd_torch.variants.view import View

DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
"""The character between columns, by the suffix of a table of scores."""

DIGITS: Final = 6
"""Number of digits behind the point of a score in a table."""


class Request(NamedTuple):
    """How variants are scored.

    Attributes:
        levels: names of the levels, each of which is asked alone.
        scoring: how they are scored, as in `score_variants`.
        view: the part of a long sequence that the model sees.
        tokens_per_batch: number of tokens that a batch holds at most; None to find it from the free memory.
    """

    levels: Sequence[str]
    scoring: Scoring = "masked"
    view: View = View()
    tokens_per_batch: int | None = None


def sound_rows(table: VariantTable | AllSingle, request: Request) -> Iterator[VariantRow]:
    """Yield the rows of a table, with a fault where a request cannot score the variant."""
    for row in table:
        if row.variant is None:
            yield row
            continue
        try:
            for sites in groups_of(row.variant, request.scoring):
                request.view.start(sites, len(table.wild_type))
        except ValueError as error:
            row = row._replace(variant=None, fault=str(error))  # noqa: PLW2901
        yield row


def score_table(
    model: RDModel,
    table: VariantTable | AllSingle,
    output: Path,
    request: Request,
    *,
    heat_map: Path | None = None,
    progress: Callable[[int], Progress] = lambda total: lambda questions, before: None,
) -> int:
    """Score the variants of a table, and write the table with a column for each level.

    Rows keep their order and their cells. A row that has no score is there too, with an empty cell;
    `<output>.failed.tsv` lists such rows with their lines and the reasons. The file appears whole. Until then
    answers of the models lie in `<output>.part`, by which the same call goes on after a kill.

    Args:
        model: the chain.
        table: the variants.
        output: the table to write, `.csv` or `.tsv`.
        request: how variants are scored.
        heat_map: picture to draw of the single substitutions; None draws none.
        progress: function that takes the number of sequences that models will read in all, and returns one
            that is called as they are read.

    Returns:
        Number of rows without a score.

    Raises:
        FileNotFoundError: where the folder of the output does not exist.
        BlockingIOError: where another process writes it.
        ValueError: for another suffix, a table without a variant that can be scored, one that has a column
            of scores already, and a level that cannot be asked.
    """
    columns = [f"{request.scoring}_{level}" for level in request.levels]
    delimiter = require_table(output, table.header, columns)
    if table.path is not None and output.resolve() == table.path.resolve():
        raise ValueError(f"expected another output than the table of variants, got {output} for both")
    if heat_map is not None:
        require_picture(heat_map)
        if not any(row.variant and len(row.variant.sites) == 1 for row in table):
            raise ValueError(f"expected single substitutions for a heat map, got none in {table.path}")
    needs = needs_of(variants_in(table, sound_rows(table, request)), request.scoring)
    questions = count_questions(table.wild_type, needs, request.scoring, request.view)
    report = progress(questions * len(request.levels))
    with _work_folder(output) as folder:
        scores = [
            ask_for_scores(
                LanguageModel(model, level, folder, request.tokens_per_batch, report),
                table.wild_type,
                needs,
                request.scoring,
                request.view,
            )
            for level in request.levels
        ]
        landscape = Landscape.empty(table.wild_type, table.first, request.levels)
        failures: list[tuple[str, Failure]] = []

        def write(path: Path) -> None:
            """Write the whole table."""
            with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
                writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
                writer.writerow([*table.header, *columns])
                writer.writerows(_scored(table, request, scores, landscape, failures))

        write_whole(output, write)
        write_failures(failure_list(output), failures)
    if heat_map is not None:
        plot_landscapes(landscape, heat_map, f"Scores ({request.scoring})")
    return len(failures)


def _scored(
    table: VariantTable | AllSingle,
    request: Request,
    scores: Sequence[Score],
    landscape: Landscape,
    failures: list[tuple[str, Failure]],
) -> Iterator[list[str]]:
    """Yield each row with its scores; note the single substitutions, and the rows that have none."""
    width = len(table.header)
    for row in sound_rows(table, request):
        if row.variant is None:
            failures.append((row.name, Failure(0, row.fault, str(table.path or ""), row.line)))
            if len(row.cells) == width:
                yield [*row.cells, *([""] * len(scores))]
            continue
        numbers = np.array([score(row.variant) for score in scores])
        landscape.note(row.variant, numbers)
        yield [*row.cells, *(f"{number:.{DIGITS}f}" for number in numbers)]


def require_table(output: Path, header: Sequence[str], columns: Sequence[str]) -> str:
    """Return the character between columns of a table that is to be written.

    Args:
        output: the table.
        header: columns that it takes over.
        columns: columns that are added.

    Raises:
        FileNotFoundError: where its folder does not exist.
        ValueError: for another suffix, and an added column that is there already.
    """
    if output.suffix not in DELIMITERS:
        raise ValueError(f"expected a table that ends in {' or '.join(DELIMITERS)}, got {str(output)!r}")
    require_folder(output)
    if taken := sorted(set(header) & set(columns)):
        raise ValueError(f"expected a table without a column {taken[0]!r}, which is to be written, got one")
    return DELIMITERS[output.suffix]


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yield the folder for answers, under a lock; it is removed when all went well."""
    folder = part_folder(output)
    folder.mkdir(exist_ok=True)
    lock = take_lock(folder, output)
    try:
        yield folder
        for kept in folder.glob("*.npz"):
            kept.unlink()
        (folder / LOCK).unlink(missing_ok=True)
    finally:
        lock.release()
    with suppress(OSError):  # other files are in the folder
        folder.rmdir()
