"""What does `rd-torch embed` cost beyond the bare forward passes, in time and in memory?

    python -m benchmarks.speed.proteome --proteins 5000 --output FILE

embeds validation and training proteins in parts of `--part` records. Of each part, alternately, the bare
forward passes over its batches, which are ready as tokens, and the whole way from a FASTA file to a
finished store (Parquet pooled, HDF5 per residue): reading, tokenising, pooling, writing, renaming. The share
is the time of the passes over the time of the whole way; loading the model is left out of both. The first
rows are a chain of 8M and 35M with random weights, the others the shipped family.

    python -m benchmarks.speed.proteome --memory --output FILE

takes the peak memory of embedding 2,000 and 50,000 records, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, islice, starmap
from pathlib import Path

import torch

import rd_torch
from benchmarks.report import Row, environment, write_result
from benchmarks.speed.contenders import add_data_argument, random_family
from rd_torch.config import ESM2_LEVELS
from rd_torch.reading import Fasta
from rd_torch.sequences import Entry, Protein, cut_batches, normalized_proteins, tokenize
from rd_torch.store import Names, cut_windows

TOKENS_PER_BATCH = 8_192
WAYS = {"pooled, .parquet": ("parquet", "mean"), "per residue, .h5": ("h5", "none")}
RECORDS = (2_000, 50_000)


def models() -> dict[str, rd_torch.RDModel]:
    """The chains by name."""
    levels = [ESM2_LEVELS["8M"], ESM2_LEVELS["35M"]]
    return {
        "8M + 35M, random weights": random_family(levels, torch.float32, "cpu").chain,
        "esm2-rd-mini": rd_torch.RDModel.from_pretrained("esm2-rd-mini"),
    }


def proteins_of(data: Path, count: int) -> list[Protein]:
    """The validation proteins, then training proteins, so many together."""
    files = [data / f"natural50_{name}.fasta.xz" for name in ("valid", "train")]
    return list(islice(chain.from_iterable(normalized_proteins(Fasta(file)) for file in files), count))


def write_fasta(proteins: Sequence[Protein], path: Path) -> None:
    path.write_text("".join(f">{each.identifier}\n{each.sequence}\n" for each in proteins))


def bare(model: rd_torch.RDModel, proteins: Sequence[Protein]) -> float:
    """Seconds of the forward passes alone, over the batches that the whole way takes."""
    batches = [
        tokenize([sequence for _, sequence in batch])
        for window in cut_windows(starmap(Entry, proteins), TOKENS_PER_BATCH, Names(str))
        for batch in cut_batches(window.contents, TOKENS_PER_BATCH)
    ]
    start = time.perf_counter()
    with torch.inference_mode():
        for tokens in batches:
            model.encode(tokens)
    return time.perf_counter() - start


def whole(model: rd_torch.RDModel, fasta: Path, suffix: str, pool: str) -> float:
    """Seconds from a FASTA file to a finished store."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rd_torch.embed_to_store(
            model,
            Fasta(fasta),
            Path(folder) / f"out.{suffix}",
            pool=pool,
            tokens_per_batch=TOKENS_PER_BATCH,
        )
        return time.perf_counter() - start


def throughput(proteins: Sequence[Protein], part: int) -> list[Row]:
    """A row a model and a way."""
    rows: list[Row] = []
    for name, model in models().items():
        passes: list[float] = []
        ways: dict[str, list[float]] = {way: [] for way in WAYS}
        residues = 0
        for start in range(0, len(proteins), part):
            chosen = proteins[start : start + part]
            residues += sum(len(each.sequence) for each in chosen)
            with tempfile.TemporaryDirectory() as folder:
                write_fasta(chosen, Path(folder) / "in.fasta")
                passes.append(bare(model, chosen))
                for way, (suffix, pool) in WAYS.items():
                    ways[way].append(whole(model, Path(folder) / "in.fasta", suffix, pool))
        for way, seconds in ways.items():
            shares = [one / other for one, other in zip(passes, seconds, strict=True)]
            rows.append(
                {
                    "model": name,
                    "store": way,
                    "residues": residues,
                    "share of the passes": round(statistics.median(shares), 3),
                    "of all parts": round(sum(passes) / sum(seconds), 3),
                    "worst part": round(min(shares), 3),
                    "residues/s": round(residues / sum(seconds)),
                }
            )
    return rows


def measured(records: int) -> None:
    """Embeds a FASTA file of so many records of 60 residues and prints the peak memory in MiB."""
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K")
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "in.fasta"
        with fasta.open("w") as file:
            file.writelines(f">P{number}\n{'MKTAYIAKQRQISFVKSHFS' * 3}\n" for number in range(records))
        rd_torch.embed_to_store(
            model,
            Fasta(fasta),
            Path(folder) / "out.h5",
            pool="none",
            tokens_per_batch=2_048,
        )
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def memory() -> list[Row]:
    """A row a number of records."""
    rows: list[Row] = []
    for records in RECORDS:
        command = [sys.executable, "-m", __spec__.name, "--records", str(records)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak = float(output.splitlines()[-1])
        first = rows[0]["peak memory, MiB"] if rows else round(peak)
        rows.append(
            {"records": records, "peak memory, MiB": round(peak), "over the first": round(peak / first, 3)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--proteins", type=int, default=5_000)
    parser.add_argument("--part", type=int, default=500, help="records that are embedded at a time")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument("--records", type=int, help=argparse.SUPPRESS)  # a process of --memory
    parser.add_argument("--output", type=Path, help="result file")
    arguments = parser.parse_args()
    if arguments.records:
        measured(arguments.records)
    elif arguments.memory:
        title = "Peak memory of embedding, shipped family's 28K, 60 residues a record, per residue into .h5"
        write_result(title, memory(), environment(), arguments.output)
    elif arguments.data is None:
        raise SystemExit("expected the folder of the protein data in --data or RD_TORCH_DATA, got none")
    else:
        rows = throughput(proteins_of(Path(arguments.data), arguments.proteins), arguments.part)
        title = f"From FASTA to a finished store, {arguments.proteins:,} proteins, CPU"
        write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
