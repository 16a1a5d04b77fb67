"""What does a search among ten million proteins cost?

    python -m benchmarks.search.scale --store train.parquet --folder FOLDER --output FILE

The script writes a Parquet store of `--proteins` vectors in float16, drawn around those of the natural
proteins in `--store`. 1,000 natural proteins, evenly spread, are kept out and are the queries. What is drawn
has a share of the natural covariance: such a share that a drawn vector is as similar to the one that it is
drawn around as a query is to the nearest natural protein (medians).

`rd_torch.build_index` then makes an exact index of the store for each of `--widths`, as it does for fewer
proteins, and one with clusters for the first of them, as it does for so many. Every index is built in a
process of its own, and searched in another one, by 1, 100 and 1,000 queries at a time, with as many clusters
scanned as `--clusters` says. Times are of searching by vectors: embedding the queries is left out. What is
read from the store is counted as the kernel is asked for it, so that it does not matter what lies in memory
already.

Recall is the share of the 10 nearest that are found. Which are the nearest, by all features and by the first
ones, a scan of the store says that shares no code with the search.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import faiss
import numpy as np

import rd_torch
from benchmarks.options import add_model_option, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.search.synthetic import Natural, units, write_store
from benchmarks.speed.meter import GIBI, MEBI, status_bytes
from benchmarks.speed.processes import in_own_process
from rd_torch.searching import Finder, building, open_index
from rd_torch.searching import index as searched
from rd_torch.searching.finding import Near
from rd_torch.store import open_store

K = 10
AT_A_TIME = (1, 100, 1_000)
ROWS = 50_000
REPEATS = 9
"""Number of single queries of which times are medians."""


class Nearest(NamedTuple):
    """The nearest proteins of each query, as the scan finds them.

    Attributes:
        places: `(queries, 10)` places in the store, by number of features.
        likeness: Median similarity of a query to the nearest one and to the tenth, by all features.
    """

    places: dict[int, np.ndarray]
    likeness: tuple[float, float]


def blocks(path: Path) -> Any:
    """Yield the vectors of a store, some at a time."""
    with open_store(path) as store:
        for start in range(0, len(store), ROWS):
            yield np.asarray(store.read(slice(start, start + ROWS)), np.float32)


def scan(path: Path, queries: np.ndarray, widths: Sequence[int]) -> Nearest:
    """Compare queries with every vector of a store.

    Args:
        path: The store.
        queries: `(queries, width)` vectors.
        widths: Numbers of first features by which to compare, the largest of them all.
    """
    sums = [(block.sum(0, dtype=np.float64), len(block)) for block in blocks(path)]
    mean = (sum(each for each, _ in sums) / sum(count for _, count in sums)).astype(np.float32)
    best = {width: [np.zeros((len(queries), 0)), np.zeros((len(queries), 0), int)] for width in widths}
    start = 0
    for block in blocks(path):
        for width, (known, places) in best.items():
            one, other = (units(each[:, :width], mean[:width]) for each in (queries, block))
            found, at = faiss.knn(one, other, min(K, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            found, at = np.hstack([known, found]), np.hstack([places, at + start])
            order = np.argsort(-found, axis=1)[:, :K]
            best[width] = [np.take_along_axis(each, order, 1) for each in (found, at)]
        start += len(block)
    similarities = np.median(best[max(widths)][0], axis=0)
    likeness = float(similarities[0]), float(similarities[-1])
    return Nearest({width: places for width, (_, places) in best.items()}, likeness)


class Built(NamedTuple):
    """What it took to make an index."""

    seconds: float
    peak: int
    size: int


def build(store: Path, path: Path, width: int, is_exact: bool) -> Built:
    """Make an index, in a process that has done nothing else."""
    start = time.perf_counter()
    with patch.object(building, "MOST_EXACT", int(1e12) if is_exact else 1):
        rd_torch.build_index(store, path, width=width).close()
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in path.iterdir())
    return Built(seconds, status_bytes("VmHWM"), size)


def bytes_read() -> int:
    """Return the number of bytes that this process has asked the kernel for, wherever they lay."""
    (line,) = [each for each in Path("/proc/self/io").read_text().splitlines() if each.startswith("rchar")]
    return int(line.split()[1])


def timed(
    near: Callable[[np.ndarray], list[Near]], queries: np.ndarray, count: int
) -> tuple[Row, list[Near]]:
    """Search so many queries at a time: a single one several times, more of them once.

    Returns:
        The milliseconds and the MiB read that one query takes, by their medians; and what was found last.
    """
    times, read, found = [], [], []
    for number in range(REPEATS if count == 1 else 1):
        part = queries[number * count : (number + 1) * count]
        before, start = bytes_read(), time.perf_counter()
        found = near(part)
        times.append((time.perf_counter() - start) * 1_000 / len(part))
        read.append((bytes_read() - before) / MEBI / len(part))
    return {"ms": round(float(np.median(times)), 2), "MiB": round(float(np.median(read)), 2)}, found


def recall(found: Sequence[Near], truth: np.ndarray) -> float:
    """Return the share of the true nearest proteins that were found."""
    pairs = zip(found, truth, strict=True)
    return float(np.mean([len(set(near.places[:K]) & set(row)) / len(row) for near, row in pairs]))


def rows_of(path: Path, model_name: str, queries: np.ndarray, truth: Nearest, scanned: int | None) -> Row:
    """Search an index, in a process that has done nothing else.

    Args:
        path: The index.
        model_name: The model whose name it bears.
        queries: The queries' vectors.
        truth: What is nearest to them.
        scanned: Number of clusters to scan; None for an exact index.

    Returns:
        Times, bytes and recalls.
    """
    model = rd_torch.RDModel.from_pretrained(model_name, device="cpu")
    before, start = status_bytes("VmRSS"), time.perf_counter()
    with patch.object(searched, "CLUSTERS_SCANNED", scanned or 1), open_index(path) as index:
        opened = time.perf_counter() - start
        width, whole = index.config.first_width, max(truth.places)
        first, both = (Finder(model, index, k=K, first_stage_only=alone) for alone in (True, False))
        first.near(queries[:1])  # pages of the index come into memory
        row: Row = {}
        counts = [count for count in AT_A_TIME if count <= len(queries)]
        for count in counts:
            taken, found = timed(first.near, queries, count)
            row[f"first stage, ms a query, {count:,} at a time"] = taken["ms"]
        for count in counts:
            taken, ranked = timed(both.near, queries, count)
            row[f"both stages, ms a query, {count:,} at a time"] = taken["ms"]
            row[f"MiB read a query, {count:,} at a time"] = taken["MiB"]
        row["first stage, recall by its features"] = round(recall(found, truth.places[width]), 3)
        row["first stage, recall by all features"] = round(recall(found, truth.places[whole]), 3)
        row["both stages, recall by all features"] = round(recall(ranked, truth.places[whole]), 3)
        row["opened in, s"] = round(opened, 1)
        row["memory of searching, GiB"] = round((status_bytes("VmHWM") - before) / GIBI, 2)
    return row


def measure(folder: Path, natural: Natural, model: str, arguments: Any) -> tuple[list[Row], Nearest]:
    """Build and search every index of the store in a folder.

    Args:
        folder: Where the store is, and where indexes are written, one at a time.
        natural: Has the queries.
        model: The model whose name the store bears.
        arguments: The command line's, with the widths and numbers of clusters.
    """
    store, path = folder / "store.parquet", folder / "store.index"
    widths = sorted({*arguments.widths, natural.facts.width})
    truth = in_own_process(scan, store, natural.queries, widths)
    report_progress(f"scanned; similarity to the nearest and the tenth {truth.likeness}")
    rows: list[Row] = []
    for width, is_exact in [*((width, True) for width in arguments.widths), (arguments.widths[0], False)]:
        built = in_own_process(build, store, path, width, is_exact)
        for scanned in [None] if is_exact else arguments.clusters:
            row: Row = {
                "width": width,
                "first stage": "every protein" if is_exact else f"{scanned} clusters",
                "built in, s": round(built.seconds),
                "memory of building, GiB": round(built.peak / GIBI, 2),
                "index, GiB": round(built.size / GIBI, 2),
            }
            row |= in_own_process(rows_of, path, model, natural.queries, truth, scanned)
            rows.append(row)
            report_progress(str(row))
        shutil.rmtree(path)
    return rows, truth


def command_line() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_model_option(parser)
    parser.add_argument("--store", type=Path, required=True, help="Store of natural proteins, by the model.")
    parser.add_argument(
        "--proteins",
        type=int,
        default=10_000_000,
        help="Number of vectors to draw, by default %(default)s.",
    )
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[32, 64, 128],
        help="Widths of the first stage, by default those of the shipped family.",
    )
    parser.add_argument(
        "--clusters",
        type=int,
        nargs="+",
        default=[16, 64, 256],
        help="Numbers of clusters to scan, by default 16, 64 and 256.",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="Folder for the store, which stays and is used again, and for an index; by default none stays.",
    )
    return parser


def main() -> None:
    """Run the command line."""
    arguments = command_line().parse_args()
    natural = Natural.read(arguments.store)
    with tempfile.TemporaryDirectory() as name:
        folder, start = arguments.folder or Path(name), time.perf_counter()
        write_store(natural, folder / "store.parquet", arguments.proteins)
        report_progress(f"wrote the store in {time.perf_counter() - start:.0f} s")
        files = [file.stat().st_size for file in (folder / "store.parquet").iterdir()]
        rows, truth = measure(folder, natural, arguments.model, arguments)
    facts = {
        "natural proteins drawn around": len(natural.centres),
        "share of their covariance": round(natural.share, 3),
        "similarity of a query to the nearest natural one": round(natural.likeness, 3),
        "to the nearest drawn one": round(truth.likeness[0], 3),
        "to the tenth": round(truth.likeness[1], 3),
        "store, GiB": round(sum(files) / GIBI, 2),
        "files of the store": len(files),
    }
    title = f"Search among {arguments.proteins:,} drawn vectors by {len(natural.queries):,} queries, CPU"
    write_result(title, rows, environment() | facts, arguments.output)


if __name__ == "__main__":
    main()
