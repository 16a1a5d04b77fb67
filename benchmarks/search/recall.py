r"""How much of the exact search is found, for how many bytes?

    rd-torch embed natural50_train.fasta.xz -o train.parquet
    rd-torch embed natural50_valid.fasta.xz -o valid.parquet
    python -m benchmarks.search.recall --store train.parquet --queries valid.parquet --picture FILE.png \
        --output FILE

The first two commands embed the natural proteins of the data folder; embedding 91,719 takes over an hour on
two cores. The proteins of one store are asked for in the other one. The truth is the cosine of all features
from the mean of the indexed proteins, in float64, and a row has the share of the 1, 10 and 100 nearest
proteins that were found: by the first features alone, or in two stages, where the given number of candidates
is put in order by all features. The first stage compares

- `prefix`: the first features, as `rd-torch search` does; searches go through `Finder.near`;
- `random projection`: as many features that a Gaussian matrix makes of all of them, mean of several draws;
- `principal components`: as many features that explain most of the variance of the indexed proteins.

A prefix alone can be had of a query without the larger backbones. The other two need every backbone for each
query, and they are no part of the store, so that an index of them is made of whole vectors.

"MiB a query" is 4 bytes times (features of the first stage x proteins + all features x candidates), which is
what must be compared. Times are of prefixes, on the threads that the environment names, without embedding
the queries: medians of rounds in which all ways take turns, first with many queries at once, as a search for
many does, then one by one. "MiB read, alone" is what the process really reads for one query in the second
case, for a store is read in groups of records. Of the proteins the first are taken where fewer are indexed;
the file is in random order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rd_torch
from benchmarks.options import add_model_option, add_rounds_option, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.search.exact import FOUND, Exact, principal_components, random_projections
from benchmarks.search.parts import index_of
from benchmarks.search.picture import draw
from benchmarks.speed.meter import MEBI
from rd_torch.searching import Finder, Index
from rd_torch.store import Store

PREFIX, RANDOM, PRINCIPAL = "prefix", "random projection", "principal components"
CANDIDATES = (30, 100, 300, 1_000)
DRAWS = 3
"""Number of random projections."""

TOGETHER, ALONE = 300, 10
"""Number of queries that the clock runs over, at once and one by one."""


class Way(NamedTuple):
    """A way to search: number of features of the first stage, and of candidates of the second, if any."""

    features: int
    candidates: int | None

    def mebibytes(self, proteins: int, width: int) -> float:
        """Return what one query is compared with, in MiB."""
        return 4 * (self.features * proteins + width * (self.candidates or 0)) / MEBI

    def finder(self, model: rd_torch.RDModel, index: Index) -> Finder:
        """Return what searches an index in this way, for as many proteins as there are candidates."""
        if self.candidates is None:
            return Finder(model, index, k=max(FOUND), candidates=max(FOUND), first_stage_only=True)
        k = min(self.candidates, max(FOUND))
        return Finder(model, index, k=k, candidates=self.candidates)


def ways(widths: Sequence[int], proteins: int) -> list[Way]:
    """Return every width alone, and all but the last with as many candidates as there are proteins for."""
    counts = [count for count in CANDIDATES if count <= proteins]
    return [Way(width, None) for width in widths] + [
        Way(width, count) for width in widths[:-1] for count in counts
    ]


def places_of(finder: Finder, queries: np.ndarray) -> np.ndarray:
    """Return the `(queries, k)` places that a finder finds."""
    return np.stack([near.places for near in finder.near(queries)])


def recall_row(first: str, way: Way, exact: Exact, found: Sequence[np.ndarray]) -> Row:
    """Return the row of a way to search, from what each draw of its first stage found."""
    recalls = list(zip(*(exact.recalls(each) for each in found), strict=True))
    shares = [None if each[0] is None else np.mean(each) for each in recalls]
    size, width = exact.proteins.shape
    return {
        "proteins": size,
        "first stage": first,
        "features": way.features,
        "candidates": way.candidates,
        **{
            f"recall@{count}": None if share is None else round(float(share), 4)
            for count, share in zip(FOUND, shares, strict=True)
        },
        "MiB a query": round(way.mebibytes(size, width), 2),
        **dict.fromkeys(("ms a query", "ms a query, alone", "MiB read, alone", "first stage, MiB")),
    }


def projected_rows(exact: Exact, proteins: np.ndarray, chosen: Sequence[Way]) -> Iterator[Row]:
    """Yield the rows of both projections.

    Args:
        exact: The truth.
        proteins: `(proteins, width)` vectors.
        chosen: The ways to search; all features alone are the truth and left out.
    """
    width = proteins.shape[1]
    for features in sorted({way.features for way in chosen if way.features < width}):
        projections = {
            RANDOM: random_projections(width, features, DRAWS),
            PRINCIPAL: [principal_components(proteins, features)],
        }
        for first, matrices in projections.items():
            most = min(max(CANDIDATES), len(proteins))
            found = [exact.by_codes(matrix, most) for matrix in matrices]
            for way in (way for way in chosen if way.features == features):
                count = way.candidates or max(FOUND)
                cut = [each[:, :count] for each in found]
                yield recall_row(
                    first, way, exact, [exact.in_order(each) for each in cut] if way.candidates else cut
                )


def read_bytes() -> int:
    """Return how many bytes this process has read from files so far, those in the page cache included."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def clock(finders: dict[Way, Finder], queries: np.ndarray, rounds: int) -> dict[Way, Row]:
    """Return what each way takes for a query: milliseconds, and MiB that are read.

    Args:
        finders: What searches in each way.
        queries: `(queries, width)` vectors.
        rounds: Number of rounds in which all take turns; the order is turned round every other time.
    """
    together, alone = queries[:TOGETHER], queries[:ALONE]
    seconds: dict[tuple[Way, bool], list[float]] = {}
    read = {}
    for finder in finders.values():
        finder.near(together)
    for number in range(rounds):
        for way, finder in list(finders.items())[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            finder.near(together)
            middle, before = time.perf_counter(), read_bytes()
            for row in alone:
                finder.near(row[None])
            end, read[way] = time.perf_counter(), read_bytes() - before
            seconds.setdefault((way, False), []).append((middle - start) / len(together))
            seconds.setdefault((way, True), []).append((end - middle) / len(alone))
    medians = {key: round(1_000 * statistics.median(each), 3) for key, each in seconds.items()}
    return {
        way: {
            "ms a query": medians[way, False],
            "ms a query, alone": medians[way, True],
            "MiB read, alone": round(read[way] / len(alone) / MEBI, 2),
        }
        for way in finders
    }


def rows_of(
    model: rd_torch.RDModel, store: Store, queries: np.ndarray, size: int, rounds: int
) -> Iterator[Row]:
    """Yield the rows of an index of the first proteins of a store."""
    names = None if size == len(store) else list(store.identifiers)[:size]
    proteins = np.asarray(store.read(slice(size)))
    chosen, exact = ways(list(model.config.widths.values()), size), Exact.of(queries, proteins)
    with ExitStack() as stack:
        indexes = {
            way.features: stack.enter_context(index_of(store, names, way.features))
            for way in chosen
            if way.candidates is None
        }
        finders = {way: way.finder(model, indexes[way.features]) for way in chosen}
        timed = clock(finders, queries, rounds)
        for way, finder in finders.items():
            (vectors,) = finder.index.path.glob("first-*.faiss")
            row = recall_row(PREFIX, way, exact, [places_of(finder, queries)])
            yield row | timed[way] | {"first stage, MiB": round(vectors.stat().st_size / MEBI, 2)}
    yield from projected_rows(exact, proteins, chosen)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_option(parser)
    add_rounds_option(parser, 5)
    parser.add_argument("--store", required=True, help="Embeddings of the proteins to index, in Parquet.")
    parser.add_argument("--queries", required=True, help="Embeddings of the proteins to look for.")
    parser.add_argument("--picture", type=Path, help="Picture to write.")
    return parser.parse_args()


def main() -> None:
    """Search indexes of three sizes."""
    arguments = read_arguments()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    rows: list[Row] = []
    with rd_torch.open_store(arguments.queries) as asked, rd_torch.open_store(arguments.store) as store:
        queries = np.asarray(asked)
        for part in (10, 3, 1):
            rows += rows_of(model, store, queries, len(store) // part, arguments.rounds)
            report_progress(f"{len(store) // part:,} proteins are searched")
    if arguments.picture:
        draw(rows, arguments.picture)
    title = f"Recall of a search in two stages, {arguments.model}"
    write_result(title, rows, environment() | {"queries": len(queries)}, arguments.output)


if __name__ == "__main__":
    main()
