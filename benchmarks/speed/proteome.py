"""What does `rd-torch embed` cost beyond the bare forward passes, in time and in memory?

    python -m benchmarks.speed.proteome --proteins 5000 --output FILE

The script embeds validation and training proteins in parts of `--part` records. Of each part, alternately, it
times the bare forward passes over its batches, which are ready as tokens, and the whole way from a FASTA file
to a finished store (Parquet pooled, HDF5 per residue): reading, tokenising, pooling, writing, renaming. The
share is the time of the passes over the time of the whole way; loading the model is left out of both. The
first rows are of a chain of 8M and 35M with random weights, the others of the shipped family.

    python -m benchmarks.speed.proteome --memory --output FILE

takes the peak memory of embedding 2,000 and 50,000 records, each in a process of its own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, islice, starmap
from pathlib import Path

import torch

import rd_torch
from benchmarks.options import add_data_option, data_folder, new_parser
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.meter import MEBI, status_bytes
from benchmarks.speed.models import random_family
from benchmarks.speed.processes import in_own_process
from rd_torch.backbone import tokenize
from rd_torch.levels import ALPHABET, ESM2_LEVELS
from rd_torch.reading import Fasta
from rd_torch.sequences import Entry, Protein, cut_batches, normalize_proteins
from rd_torch.store import Names, cut_windows

TOKENS_PER_BATCH = 8_192
WAYS = {"pooled, .parquet": ("parquet", "mean"), "per residue, .h5": ("h5", "none")}
RECORDS = (2_000, 50_000)


def models() -> dict[str, rd_torch.RDModel]:
    """Return the chains by name."""
    levels = [ESM2_LEVELS["8M"], ESM2_LEVELS["35M"]]
    return {
        "8M + 35M, random weights": random_family(levels, torch.float32, "cpu").chain,
        "esm2-rd-mini": rd_torch.RDModel.from_pretrained("esm2-rd-mini"),
    }


def proteins_of(data: Path, count: int) -> list[Protein]:
    """Return the validation proteins, then training proteins, so many together."""
    files = [data / f"natural50_{name}.fasta.xz" for name in ("valid", "train")]
    return list(islice(chain.from_iterable(normalize_proteins(Fasta(file)) for file in files), count))


def write_fasta(proteins: Sequence[Protein], path: Path) -> None:
    """Write proteins as a FASTA file."""
    path.write_text("".join(f">{each.identifier}\n{each.sequence}\n" for each in proteins))


def seconds_of_passes(model: rd_torch.RDModel, proteins: Sequence[Protein]) -> float:
    """Return the seconds of the forward passes alone, over the batches that the whole way takes."""
    batches = [
        tokenize([sequence for _, sequence in batch], ALPHABET)
        for window in cut_windows(starmap(Entry, proteins), TOKENS_PER_BATCH, Names(str))
        for batch in cut_batches(window.contents, TOKENS_PER_BATCH)
    ]
    start = time.perf_counter()
    with torch.inference_mode():
        for tokens in batches:
            model.encode(tokens)
    return time.perf_counter() - start


def seconds_of_everything(model: rd_torch.RDModel, fasta: Path, suffix: str, pool: str) -> float:
    """Return the seconds from a FASTA file to a finished store.

    Args:
        model: The chain.
        fasta: The file.
        suffix: Suffix of the store, `"parquet"` or `"h5"`.
        pool: `"mean"` for a vector a protein, `"none"` for a vector a residue.
    """
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


def seconds_by_part(
    model: rd_torch.RDModel, parts: Sequence[Sequence[Protein]]
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the seconds of the passes of each part, and by way those of everything."""
    passes: list[float] = []
    ways: dict[str, list[float]] = {way: [] for way in WAYS}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            fasta = Path(folder) / "in.fasta"
            write_fasta(part, fasta)
            passes.append(seconds_of_passes(model, part))
            for way, (suffix, pool) in WAYS.items():
                ways[way].append(seconds_of_everything(model, fasta, suffix, pool))
    return passes, ways


def throughput(proteins: Sequence[Protein], size: int) -> list[Row]:
    """Return a row for each model and way.

    Args:
        proteins: What to embed.
        size: Number of proteins in a part.
    """
    rows: list[Row] = []
    parts = [proteins[start : start + size] for start in range(0, len(proteins), size)]
    residues = sum(len(each.sequence) for each in proteins)
    for name, model in models().items():
        passes, ways = seconds_by_part(model, parts)
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


def peak_of(records: int) -> float:
    """Embed so many records of 60 residues from a FASTA file; return this process's peak memory in MiB."""
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
    return status_bytes("VmHWM") / MEBI


def memory() -> list[Row]:
    """Return a row for each number of records."""
    rows: list[Row] = []
    for records in RECORDS:
        peak = in_own_process(peak_of, records)
        first = rows[0]["peak memory, MiB"] if rows else round(peak)
        rows.append(
            {"records": records, "peak memory, MiB": round(peak), "over the first": round(peak / first, 3)}
        )
    return rows


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    parser.add_argument(
        "--proteins", type=int, default=5_000, help="Number of proteins to embed, by default %(default)s."
    )
    parser.add_argument(
        "--part", type=int, default=500, help="Number of records to embed at a time, by default %(default)s."
    )
    parser.add_argument("--memory", action="store_true", help="Measure peak memory in place of time.")
    arguments = parser.parse_args()
    if arguments.memory:
        title = "Peak memory of embedding, shipped family's 28K, 60 residues a record, per residue into .h5"
        rows = memory()
    else:
        title = f"From FASTA to a finished store, {arguments.proteins:,} proteins, CPU"
        rows = throughput(proteins_of(data_folder(arguments), arguments.proteins), arguments.part)
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
