"""How far half-precision backbones are from float32, per block of features that a level adds.

    python -m benchmarks.speed.half_precision mini --output benchmarks/results/half_precision_mini.json
    python -m benchmarks.speed.half_precision 650M --output benchmarks/results/half_precision_650M.json

A level's block is what it adds to the nested embedding. Each variant turns the backbones alone; weights
and float32 maps are those of the reference. In `float16` and `bfloat16` the residual stream has that
type too, rounded after every addition, and so has the embedding that leaves the backbone; in `...,
float32 residual` the stream stays in float32, as the library has it. Errors are over residues, in units
of the block's standard deviation in float32: the root of its features' mean variance over residues.
"Pooled" is the largest error of a protein's mean, in the same units. Cosines are between a residue's two
block vectors, both less the mean in float32. Proteins are natural ones of the validation set, of at most
1,022 residues.

`mini` is the shipped, trained family. `650M` has the full shapes of ESM-2 8M to 650M and random weights:

- PyTorch's initial weights from a seed a level, `q_proj` and `k_proj` doubled, so that a
  query attends to about as many keys as in the shipped family's largest backbone;
- each layer's `out_proj` and `fc2`, weights and biases, scaled so that the root-mean-square of the
  residual stream follows that of the shipped family's largest backbone, after the embedding and after
  each layer, interpolated over relative depth; attention goes half of each layer's way;
- four random channels, which the growth leaves out, hold constants of both signs, 50 times the median
  channel's root-mean-square, set by the biases of `out_proj` and `fc2`. The LayerNorms before attention
  and feed-forward block have weights that bring all channels to unit size; the last one's are ones;
- the maps are fitted by `rd_torch.fit` in float32, on proteins that are not compared.

Growth and constants are closed forms, found layer after layer on the first 126 residues of two proteins.
What was reached, on proteins that are compared, stands with the environment: the growth from the
embedding to the last layer; the four channels' magnitude at the end, median over tokens; the number of
keys that a query attends to (the exponential of the attention's entropy, mean over queries, heads and
layers); and the share of the stream's mean square that varies between tokens, the four channels apart.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rd_torch
from benchmarks.report import Row, environment, write_result
from rd_torch.config import ALPHABET, ESM2_LEVELS, Level
from rd_torch.esm2 import ESM2, MEAN_SHARE_KEPT
from rd_torch.layer import TransformerLayer
from rd_torch.packing import Packing
from rd_torch.reading import Fasta
from rd_torch.sequences import cut_batches, normalized, tokenize
from rd_torch.tokens import is_residue

LEVELS = ("8M", "35M", "150M", "650M")
DTYPES = (torch.float16, torch.bfloat16)
MOST_RESIDUES = 1_022
TOKENS_PER_BATCH = 2_048
GAIN = 2.0
CONSTANTS = (50.0, -50.0, 50.0, -50.0)

Means = tuple[Tensor, Tensor]
Facts = dict[str, Any]


class HalfResidual(TransformerLayer):
    """A layer whose residual stream has the weights' dtype: each addition is rounded to it."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """`(tokens, width)` to the same, in the weights' dtype."""
        return super().forward(x.to(self.final_layer_norm.weight.dtype), *rest)


@contextmanager
def half_residual(model: rd_torch.RDModel) -> Iterator[None]:
    """All layers of the model as `HalfResidual`."""
    layers = [layer for backbone in model.backbones.values() for layer in backbone.layers]
    for layer in layers:
        layer.__class__ = HalfResidual
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = TransformerLayer


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def residual_stream(backbone: ESM2, tokens: Tensor) -> tuple[list[Tensor], float]:
    """The packed stream after the embedding and after each layer, and how many keys a query attends to."""
    stream: list[Tensor] = []
    keys: list[float] = []
    packing = Packing.of(tokens != ALPHABET.padding_idx)

    def count(maps: Tensor) -> None:
        entropy = torch.special.entr(maps).sum(-1).transpose(1, 2)[packing.real]
        keys.append(float(entropy.exp().mean()))

    hooks = [backbone.layers[0].register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda *call: stream.append(call[-1])) for layer in backbone.layers]
    backbone(tokens, packing, count)
    for hook in hooks:
        hook.remove()
    return stream, sum(keys) / len(keys)


def branch_scale(x: Tensor, branch: Tensor, target: float) -> float:
    """The s > 0 for which `x + s branch` has the root-mean-square `target`, above that of x."""
    a, b = branch.square().mean(), (x * branch).mean()
    return float(((b.square() + a * (target**2 - x.square().mean())).sqrt() - b) / a)


class Calibration:
    """Hooks that, in one forward pass, give the stream its growth and four channels their constants.

    Args:
        backbone: its weights are changed in place.
        targets: root-mean-square of the other channels after the embedding and after each layer.
        constants: `(width,)` signed constants in units of the median channel, zero in the others.
    """

    def __init__(self, backbone: ESM2, targets: Sequence[float], constants: Tensor) -> None:
        self.x = torch.zeros(())
        self.constants = constants
        self.hooks = [backbone.layers[0].register_forward_pre_hook(self.start)]
        for layer, (before, after) in zip(backbone.layers, pairwise(targets), strict=True):
            for linear, target in ((layer.self_attn.out_proj, (before + after) / 2), (layer.fc2, after)):
                self.hooks.append(linear.register_forward_hook(partial(self.grow, target)))

    def start(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Takes the embedding."""
        self.x = inputs[0]

    def grow(self, target: float, linear: nn.Linear, _: object, out: Tensor) -> Tensor:
        """Scales a branch to the target and moves the four channels' mean by its bias."""
        plain = self.constants == 0
        scale = branch_scale(self.x[:, plain], out[:, plain], target)
        after = self.x + scale * out
        unit = after.square().mean(0).sqrt().median()
        shift = torch.where(plain, 0, self.constants * unit - after.mean(0))
        linear.weight.mul_(scale)
        linear.bias.mul_(scale).add_(shift)
        self.x = after + shift
        return scale * out + shift


def random_backbone(level: Level, tokens: Tensor, curve: Sequence[float], seed: int) -> ESM2:
    """Random weights by the recipe above."""
    torch.manual_seed(seed)
    backbone = ESM2(level.num_layers, level.width, level.attention_heads).eval()
    depth = np.linspace(0, 1, level.num_layers + 1)
    targets = np.interp(depth, np.linspace(0, 1, len(curve)), curve).tolist()
    constants = torch.zeros(level.width)
    constants[torch.randperm(level.width)[: len(CONSTANTS)]] = torch.tensor(CONSTANTS)
    size = constants.abs().clamp(min=1)
    backbone.embed_tokens.weight.mul_(targets[0] / MEAN_SHARE_KEPT)
    for layer in backbone.layers:
        layer.self_attn.q_proj.weight.mul_(GAIN)
        layer.self_attn.k_proj.weight.mul_(GAIN)
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            norm.weight.copy_(size.square().mean().sqrt() / size)
    calibration = Calibration(backbone, targets, constants)
    backbone(tokens, Packing.of(tokens != ALPHABET.padding_idx))
    for hook in calibration.hooks:
        hook.remove()
    return backbone


def reached(backbone: ESM2, tokens: Tensor) -> str:
    """What the recipe made of a backbone, on tokens that it was not calibrated on."""
    stream, keys = residual_stream(backbone, tokens)
    last = stream[-1]
    magnitudes = last.abs().median(0).values / last.square().mean(0).sqrt().median()
    order = magnitudes.argsort(descending=True)
    largest, plain = magnitudes[order[: len(CONSTANTS)]], order[len(CONSTANTS) :]
    growth = root_mean_square(last[:, plain]) / root_mean_square(stream[0][:, plain])
    varying = last[:, plain].var(0).mean() / last[:, plain].square().mean()
    return (
        f"growth {growth:.3g}, channels {largest.min():.3g} to {largest.max():.3g}, "
        f"{keys:.3g} keys, {varying:.2g} varying"
    )


def random_family(fitted: Sequence[str], tokens: Tensor, most_layers: int) -> tuple[rd_torch.RDModel, Facts]:
    """The 650M chain with random weights and fitted maps, and what the recipe reached on `tokens`."""
    *_, largest = rd_torch.RDModel.from_pretrained("esm2-rd-mini").backbones.values()
    curve = [root_mean_square(x) for x in residual_stream(largest, tokens)[0]]
    calibrated = tokenize([sequence[:126] for sequence in fitted[:2]])
    facts: Facts = {"asked for": f"growth {curve[-1] / curve[0]:.3g}, channels {CONSTANTS[0]:.3g}"}
    backbones: dict[str, ESM2] = {}
    for seed, name in enumerate(LEVELS):
        layers = min(ESM2_LEVELS[name].num_layers, most_layers)
        level = replace(ESM2_LEVELS[name], num_layers=layers)
        backbones[name] = random_backbone(level, calibrated, curve, seed)
        facts[f"{name} reached"] = reached(backbones[name], tokens)
    model = rd_torch.fit(backbones, fitted, tokens_per_batch=TOKENS_PER_BATCH)
    facts["residues fitted on"] = model.config.provenance["fit"]["residues"]
    facts["R^2"] = ", ".join(f"{each.r2:.3g}" for each in model.config.explained)
    return model, facts


def embed(model: rd_torch.RDModel, batches: Sequence[Tensor]) -> Means:
    """Nested embeddings of all residues and their mean in each protein, in float64."""
    rows, means = [], []
    for tokens in batches:
        embeddings, kept = model.encode(tokens).double(), is_residue(tokens)
        rows.append(embeddings[kept])
        means.append((embeddings * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))
    return torch.cat(rows), torch.cat(means)


def three_digits(value: Tensor) -> float:
    return float(f"{value:.3g}")


def compare(widths: dict[str, int], variant: str, exact: Means, rounded: Means) -> list[Row]:
    """One row a level: how far its block is from float32."""
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


def measure(model: rd_torch.RDModel, batches: Sequence[Tensor]) -> list[Row]:
    """All variants against float32, sorted by level."""
    exact, widths = embed(model, batches), model.config.widths
    rows = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        half = copy.deepcopy(model).to(dtype)
        with half_residual(half):
            rows += compare(widths, name, exact, embed(half, batches))
        rows += compare(widths, f"{name}, float32 residual", exact, embed(half, batches))
    return sorted(rows, key=lambda row: list(widths).index(row["level"]))


def take(sequences: Iterator[str], residues: int) -> list[str]:
    """The next sequences, until they hold that many residues."""
    taken: list[str] = []
    while sum(map(len, taken)) < residues:
        taken.append(next(sequences))
    return taken


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison with float32: which family, on which proteins."""
    data = os.environ.get("RD_TORCH_DATA")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("mini", "650M"))
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--data", type=Path, default=data, required=not data, help="folder of the proteins")
    parser.add_argument("--residues", type=int, help="to compare: 22,000 for mini, 1,500 for 650M")
    parser.add_argument("--fit-residues", type=int, default=5_000, help="to fit the maps of 650M on")
    parser.add_argument("--layers", type=int, default=33, help="a random backbone has at most")
    return parser


def prepare(arguments: argparse.Namespace) -> tuple[rd_torch.RDModel, list[Tensor], Facts]:
    """The model in float32, the batches to compare on, and the facts of both."""
    found = list(Fasta(arguments.data / "natural50_valid.fasta.xz"))
    short = normalized(each.sequence for each in found if len(each.sequence) <= MOST_RESIDUES)
    proteins = take(short, arguments.residues or (22_000 if arguments.family == "mini" else 1_500))
    batches = [tokenize([each for _, each in batch]) for batch in cut_batches(proteins, TOKENS_PER_BATCH)]
    facts: Facts = {"proteins": len(proteins), "residues": sum(map(len, proteins))}
    if arguments.family == "mini":
        return rd_torch.RDModel.from_pretrained("esm2-rd-mini"), batches, facts
    model, more = random_family(take(short, arguments.fit_residues), batches[0], arguments.layers)
    return model, batches, facts | more


@torch.no_grad()
def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    model, batches, facts = prepare(arguments)
    rows = measure(model, batches)
    title = f"Half precision against float32, per added block: {arguments.family}"
    write_result(title, rows, {**environment(), **facts}, arguments.output)


if __name__ == "__main__":
    main()
