"""How far changed backbones are from float32: what several scripts measure, and on what.

A level's block is what it adds to the nested embedding. Errors are over residues, in units of the block's
standard deviation in float32: the root of its features' mean variance over residues. The pooled error is the
largest error of a protein's mean, in the same units. Cosines are between a residue's two block vectors, both
less the mean in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import rd_torch
from benchmarks.options import add_data_option, data_folder, new_parser
from benchmarks.proteins import MAX_RESIDUES
from benchmarks.result import Row
from benchmarks.speed.lifelike_weights import FAMILIES, Facts, lifelike_family
from rd_torch.backbone import is_residue, tokenize
from rd_torch.levels import ALPHABET
from rd_torch.reading import Fasta
from rd_torch.sequences import cut_batches, normalize_sequences

MINI = "mini"
TOKENS_PER_BATCH = 2_048
Means = tuple[Tensor, Tensor]


def embed(model: rd_torch.RDModel, batches: Sequence[Tensor]) -> Means:
    """Return nested embeddings of all residues, and their mean in each protein, in float64."""
    rows, means = [], []
    for tokens in batches:
        embeddings, kept = model.encode(tokens).double(), is_residue(tokens, ALPHABET)
        rows.append(embeddings[kept])
        means.append((embeddings * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))
    return torch.cat(rows), torch.cat(means)


def three_digits(value: Tensor | float) -> float:
    """Round a number to three digits."""
    return float(f"{float(value):.3g}")


def compare(widths: dict[str, int], variant: str, exact: Means, rounded: Means) -> list[Row]:
    """Return a row for each level, which says how far its block is from float32.

    Args:
        widths: Width of the embedding at each level.
        variant: Name of what was done to the backbones.
        exact: Embeddings in float32.
        rounded: Embeddings of the variant.
    """
    rows = []
    for level, (start, stop) in zip(widths, pairwise([0, *widths.values()]), strict=True):
        (x, pooled), (y, other) = ([part[:, start:stop] for part in pair] for pair in (exact, rounded))
        unit = x.var(0, correction=0).mean().sqrt()
        error, pooled_error = (y - x).abs() / unit, (other - pooled).abs() / unit
        cosine = torch.cosine_similarity(x - x.mean(0), y - x.mean(0), dim=1)
        rows.append(
            {
                "level": level,
                "features": f"{start} to {stop - 1}",
                "backbones": variant,
                "error, largest": three_digits(error.max()),
                "error, mean": three_digits(error.mean()),
                "cosine, smallest": round(float(cosine.min()), 7),
                "cosine, mean": round(float(cosine.mean()), 7),
                "pooled error, largest": three_digits(pooled_error.max()),
            }
        )
    return rows


def take(sequences: Iterator[str], residues: int) -> list[str]:
    """Take the next sequences, until they hold that many residues."""
    taken: list[str] = []
    while sum(map(len, taken)) < residues:
        taken.append(next(sequences))
    return taken


def new_family_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that takes which family is compared with float32, and on which proteins."""
    parser = new_parser(description)
    add_data_option(parser)
    parser.add_argument(
        "family",
        choices=(MINI, *FAMILIES),
        help="mini is the shipped, trained family; the others have random weights: 650M ESM-2's shapes, esmc "
        "those of ESM-C 300M and 600M, and 6B's depth.",
    )
    parser.add_argument(
        "--residues",
        type=int,
        help="Number of residues to compare, by default 22,000 for mini and 1,500 for the others.",
    )
    parser.add_argument(
        "--fit-residues",
        type=int,
        default=5_000,
        help="Number of residues that the maps of random weights are fitted on, by default %(default)s.",
    )
    parser.add_argument(
        "--layers", type=int, default=80, help="Number of layers that a random backbone has at the most."
    )
    return parser


def prepare(arguments: argparse.Namespace) -> tuple[rd_torch.RDModel, list[Tensor], Facts]:
    """Return the model in float32, the batches to compare on, and the facts of both."""
    found = list(Fasta(data_folder(arguments) / "natural50_valid.fasta.xz"))
    short = normalize_sequences(each.sequence for each in found if len(each.sequence) <= MAX_RESIDUES)
    proteins = take(short, arguments.residues or (22_000 if arguments.family == MINI else 1_500))
    batches = [
        tokenize([each for _, each in batch], ALPHABET) for batch in cut_batches(proteins, TOKENS_PER_BATCH)
    ]
    facts: Facts = {"proteins": len(proteins), "residues": sum(map(len, proteins))}
    if arguments.family == MINI:
        return rd_torch.RDModel.from_pretrained("esm2-rd-mini"), batches, facts
    fitted = take(short, arguments.fit_residues)
    model, more = lifelike_family(arguments.family, fitted, batches[0], arguments.layers, TOKENS_PER_BATCH)
    return model, batches, facts | more
