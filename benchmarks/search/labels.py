"""Are labels honest: how many of those that a search gives are right, and what do strangers get?

    rd-torch embed natural50_train.fasta.xz -o train.parquet
    python -m benchmarks.search.labels --store train.parquet --output FILE

Families are those of `benchmarks.search.families`, which are remote; and families that are made, of mutated
copies of SCOPe domains with 5 to 50 % of the residues changed, so that there are near ones, too. In each of
several draws a fifth of the families are unknown: none of their members is indexed or has a label, and the
true answer for all of them is that nothing is near. Of every other family a fifth of the members are asked
for, and the others are indexed. The labels come from `LabelTransfer`, as `rd-torch search --labels` gives
them, and the first one counts.

A row is of the labels whose stated reliability lies between two numbers. Where it reaches to 1 and begins at
0.5, 0.7 or 0.9, this is what a user gets who asks for that reliability. Columns:

- `known, labelled` and `right`: the share of the queries of known families that get such a label, and the
  share of these labels that is right;
- `unknown, labelled` and `foretold`: the share of the queries of unknown families that get one, all wrongly,
  and what `LabelTransfer.strangers` says of it, where a reliability is asked for;
- `half: stated` and `half: right`: the mean reliability that is stated, and the share that is right, where
  queries of known and of unknown families count half each, which is what a reliability is said to be of.

Intervals are 95 % of a bootstrap over families, all draws of one staying together.
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
from benchmarks.search.labelled import Labelled, Split, read_labelled, share_with_interval, split
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


class Told(NamedTuple):
    """What a search says of all queries where a reliability is asked for.

    Attributes:
        answers: What it says of each.
        strangers: The share of queries of unknown families that it expects to label, in each draw.
    """

    answers: list[Answer]
    strangers: list[float]


def ask(
    model: rd_torch.RDModel, store: Store, labelled: Labelled, drawn: Split, told: dict[float, Told]
) -> None:
    """Add what a search says of the queries of one draw, for each reliability that is asked for."""
    queries = [*drawn.related, *drawn.strange]
    known = {protein: frozenset([labelled.labels[protein]]) for protein in drawn.known}
    vectors = np.asarray(store.read(queries))
    with index_of(store, drawn.known) as index:
        finder = Finder(model, index)
        for least, (answers, strangers) in told.items():
            transfer = LabelTransfer(finder, Labels(known, labelled.name), least)
            strangers.append(transfer.strangers)
            for number, near in enumerate(transfer.near(vectors)):
                truth = labelled.labels[queries[number]]
                first = next(transfer.of(queries[number], near))
                stated = first.reliability if first.label else np.nan
                answers.append(Answer(truth, number < len(drawn.related), stated, first.label == truth))


def row_of(answers: Sequence[Answer], low: float, high: float) -> Row:
    """Return the row of the labels of a range of stated reliability; the end belongs to it where it is 1."""
    inside = [each for each in answers if low <= each.reliability and (each.reliability < high or high == 1)]
    known = [each for each in inside if each.is_known]
    totals = {kind: sum(each.is_known == kind for each in answers) for kind in (True, False)}
    weights = [1 / totals[each.is_known] for each in inside]
    stated = np.average([each.reliability for each in inside], weights=weights) if inside else None
    return {
        "stated, from": low,
        "to": high,
        "known, labelled": f"{len(known) / max(1, totals[True]):.3f}",
        "right": _share_right(known),
        "unknown, labelled": f"{(len(inside) - len(known)) / max(1, totals[False]):.3f}",
        "foretold": None,
        "half: stated": None if stated is None else f"{stated:.3f}",
        "half: right": _share_right(inside, weights),
    }


def _share_right(answers: Sequence[Answer], weights: Sequence[float] = ()) -> str | None:
    """Return the share of labels that is right, with its interval; None where there are none."""
    if not answers:
        return None
    families, right = zip(*((each.family, each.is_right) for each in answers), strict=True)
    return share_with_interval(families, right, weights)


def rows_of(model: rd_torch.RDModel, store: Store, labelled: Labelled, draws: int) -> Iterator[Row]:
    """Yield the rows of one kind of families: of each reliability that is asked for, then of all ranges."""
    told = {least: Told([], []) for least in (*ASKED, 0.0)}
    for seed in range(draws):
        ask(model, store, labelled, split(labelled, seed), told)
    everything = told[0.0].answers
    known = sum(each.is_known for each in everything)
    common = {"labels": labelled.name, "known": known, "unknown": len(everything) - known}
    for least in ASKED:
        answers, strangers = told[least]
        yield common | row_of(answers, least, 1.0) | {"foretold": f"{np.mean(strangers):.3f}"}
    for low, high in pairwise(EDGES):
        yield common | row_of(everything, low, high)


def main() -> None:
    """Give labels to proteins of known families and of others."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument("--store", required=True, type=Path, help="Embeddings of natural50_train.fasta.xz.")
    parser.add_argument(
        "--domains", type=int, default=600, help="Number of domains that are copied, by default %(default)s."
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
