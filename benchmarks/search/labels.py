"""Are labels honest: how many of those that a search gives are right, and what do strangers get?

    rd-torch embed natural50_train.fasta.xz -o train.parquet
    python -m benchmarks.search.labels --store train.parquet --output FILE

Families are those of `benchmarks.search.families`, which are remote; and families that are made, of mutated
copies of SCOPe domains with 10 to 80 % of the residues changed, so that there are near ones, too. In each of
several draws a fifth of the families are unknown: none of their members is indexed or has a label, and the
true answer for all of them is that nothing is near. Of every other family a fifth of the members are asked
for, and the others are indexed. The labels come from `LabelTransfer`, as `rd-torch search --labels` gives
them, and the first one counts.

A row is of the labels whose stated reliability lies between two numbers. Where it reaches to 1 and begins at
0.5, 0.7 or 0.9, this is what a user gets who asks for that reliability. Columns: the share of the queries of
known families that get such a label; of these labels the share that is right, beside the mean that is stated;
the share of the queries of unknown families that get one, all wrongly; and the share that is right of the
labels of both. Intervals are 95 % of a bootstrap over families, all draws of one staying together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

import rd_torch
from benchmarks.options import add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.search.copies import write_copies
from benchmarks.search.labelled import Labelled, Split, read_labelled, shares_by_family, split, with_interval
from benchmarks.search.parts import index_of
from rd_torch.searching import Finder, Labels
from rd_torch.searching.labels import LabelTransfer
from rd_torch.store import Store

ASKED = (0.5, 0.7, 0.9)
"""Reliabilities that are asked for."""

COPIES = 6
"""Number of mutated copies of a domain."""

EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Ends of the ranges of stated reliability."""


class Answer(NamedTuple):
    """What a search says of one query.

    Attributes:
        family: The true label.
        is_known: Whether a labelled protein has it.
        reliability: The stated reliability of the first label; NaN where there is no label.
        is_right: Whether the first label is the true one.
    """

    family: str
    is_known: bool
    reliability: float
    is_right: bool


def answers(
    model: rd_torch.RDModel, store: Store, labelled: Labelled, drawn: Split, least: Sequence[float]
) -> Iterator[list[Answer]]:
    """Yield what a search says of all queries of a draw, for each least reliability."""
    queries = [*drawn.related, *drawn.strange]
    known = {protein: frozenset([labelled.labels[protein]]) for protein in drawn.known}
    vectors = np.asarray(store.read(queries))
    with index_of(store, drawn.known) as index:
        finder = Finder(model, index)
        for reliability in least:
            transfer = LabelTransfer(finder, Labels(known, labelled.name), reliability)
            found = []
            for number, near in enumerate(transfer.near(vectors)):
                truth = labelled.labels[queries[number]]
                first = next(transfer.of(queries[number], near))
                stated = first.reliability if first.label else np.nan
                found.append(Answer(truth, number < len(drawn.related), stated, first.label == truth))
            yield found


def row_of(given: Sequence[Answer], low: float, high: float) -> Row:
    """Return the row of the labels of a range of stated reliability; the end belongs to it where it is 1."""
    known = [each for each in given if each.is_known]
    unknown = [each for each in given if not each.is_known]
    inside = [each for each in given if low <= each.reliability and (each.reliability < high or high == 1)]
    of_known = [each for each in inside if each.is_known]
    stated = np.mean([each.reliability for each in of_known]) if of_known else None
    return {
        "stated, from": low,
        "to": high,
        "known families: with such a label": f"{len(of_known) / max(1, len(known)):.3f}",
        "stated, mean": None if stated is None else f"{stated:.3f}",
        "right": _share_right(of_known),
        "unknown families: with such a label": f"{(len(inside) - len(of_known)) / max(1, len(unknown)):.3f}",
        "right of both": _share_right(inside),
    }


def _share_right(given: Sequence[Answer]) -> str | None:
    """Return the share of labels that is right, with its interval; None where there are none."""
    if not given:
        return None
    sums = shares_by_family([each.family for each in given], [each.is_right for each in given])
    return with_interval(sums)


def rows_of(model: rd_torch.RDModel, store: Store, labelled: Labelled, draws: int) -> Iterator[Row]:
    """Yield the rows of one kind of families: of each reliability that is asked for, then of all ranges."""
    least = (*ASKED, 0.0)
    found: dict[float, list[Answer]] = {reliability: [] for reliability in least}
    for seed in range(draws):
        drawn = answers(model, store, labelled, split(labelled, seed), least)
        for reliability, given in zip(least, drawn, strict=True):
            found[reliability] += given
    known = sum(each.is_known for each in found[0.0])
    common = {
        "labels": labelled.name,
        "queries of known families": known,
        "of unknown ones": len(found[0.0]) - known,
    }
    for reliability in ASKED:
        yield common | row_of(found[reliability], reliability, 1.0)
    for low, high in pairwise(EDGES):
        yield common | row_of(found[0.0], low, high)


def main() -> None:
    """Give labels to proteins of known families and of others."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument("--store", required=True, type=Path, help="Embeddings of natural50_train.fasta.xz.")
    parser.add_argument(
        "--domains", type=int, default=400, help="Number of domains that are copied, by default %(default)s."
    )
    parser.add_argument("--draws", type=int, default=5, help="Number of draws, by default %(default)s.")
    arguments = parser.parse_args()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    rows: list[Row] = []
    data = data_folder(arguments)
    with rd_torch.open_store(arguments.store) as store:
        for labelled in read_labelled(data, store)[0]:
            rows += rows_of(model, store, labelled, arguments.draws)
            report_progress(f"{labelled.name}: done")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "copies.parquet"
        labelled = write_copies(model, data, path, arguments.domains, COPIES)
        with rd_torch.open_store(path) as store:
            rows += rows_of(model, store, labelled, arguments.draws)
    title = f"Labels of neighbours, {arguments.model}"
    write_result(title, rows, environment() | {"draws": arguments.draws}, arguments.output)


if __name__ == "__main__":
    main()
