"""Random weights of ESM-2's and ESM-C's shapes whose numbers behave like a trained model's.

Rounding errors depend on the weights, so plain random ones would not do. The recipe:

- PyTorch's initial weights from a seed for each level, `q_proj` and `k_proj` doubled, so that a query attends
  to about as many keys as in the shipped family's largest backbone (in ESM-C the LayerNorms of queries and
  keys give them the same variance, which leaves attention flatter);
- the linear layers that end a layer's two branches, weights and biases, scaled so that the root-mean-square
  of the residual stream follows that of the shipped family's largest backbone, after the embedding and after
  each layer, interpolated over relative depth; attention goes half of each layer's way;
- four random channels, which the growth leaves out, hold constants of both signs, 50 times the median
  channel's root-mean-square, set by the biases of these linear layers, or, as ESM-C has none, by the table of
  embeddings, so that ESM-C has them as large from the first layer on. The LayerNorms before attention and
  before the feed-forward block have weights that bring all channels to unit size; the last one's are ones.

Growth and constants are closed forms, found layer after layer on the first 126 residues of two proteins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

import rd_torch
from rd_torch.backbone import (
    ESM2,
    ESMC,
    MEAN_SHARE_KEPT,
    Encoder,
    Packing,
    TransformerLayer,
    class_of,
    tokenize,
)
from rd_torch.levels import ALPHABET, ESM2_LEVELS, ESMC_LEVELS, Level

FAMILIES = {
    "650M": [ESM2_LEVELS[name] for name in ("8M", "35M", "150M", "650M")],
    # The depth of ESM-C 6B at a fourth of its width, then the two sizes that fit a small machine.
    "esmc": [
        Level("80 layers", num_layers=80, width=640, attention_heads=10, family=ESMC.family),
        *(ESMC_LEVELS[name] for name in ("300M", "600M")),
    ],
}
"""The levels of each family that can be made."""

GAIN = 2.0
CONSTANTS = (50.0, -50.0, 50.0, -50.0)
CALIBRATED_ON = 126
"""Number of residues: with `<cls>` and `<eos>` 128 tokens."""

Facts = dict[str, Any]


def root_mean_square(x: Tensor) -> float:
    """Return the root-mean-square of all numbers in a tensor."""
    return float(x.square().mean().sqrt())


class Ends(NamedTuple):
    """What the recipe sets in a layer, whatever its family calls it.

    Attributes:
        norms: The LayerNorms at the beginning of the two branches.
        linears: The linear layers at their ends.
        share: What the branches are multiplied by before they are added.
    """

    norms: tuple[nn.LayerNorm, ...]
    linears: tuple[nn.Linear, ...]
    share: float

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Return those of a layer of ESM-2 or of ESM-C."""
        if isinstance(layer, TransformerLayer):
            norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
            return cls(norms, (layer.self_attn.out_proj, layer.fc2), 1.0)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        return cls(norms, (layer.self_attn.o_proj, layer.mlp.down_proj), layer.share)


def residual_stream(backbone: Encoder, tokens: Tensor) -> tuple[list[Tensor], float]:
    """Return the packed stream after the embedding and each layer, and how many keys a query attends to."""
    stream: list[Tensor] = []
    keys: list[float] = []
    packing = Packing.of(tokens != ALPHABET.padding_idx)

    def count(maps: Tensor) -> None:
        entropy = torch.special.entr(maps).sum(-1).transpose(1, 2)[packing.real]
        keys.append(float(entropy.exp().mean()))

    layers = backbone.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda *call: stream.append(call[-1])) for layer in layers]
    backbone(tokens, packing, count)
    for hook in hooks:
        hook.remove()
    return stream, sum(keys) / len(keys)


def branch_scale(x: Tensor, branch: Tensor, target: float) -> float:
    """Return the s > 0 for which `x + s branch` has the root-mean-square `target`, above that of x."""
    a, b = branch.square().mean(), (x * branch).mean()
    return float(((b.square() + a * (target**2 - x.square().mean())).sqrt() - b) / a)


class Calibration:
    """Hooks that, in one forward pass, give the stream its growth and four channels their constants.

    Args:
        backbone: The backbone, whose weights are changed in place.
        targets: Root-mean-square of the other channels after the embedding and after each layer.
        constants: `(width,)` signed constants in units of the median channel, zero in the others.
    """

    def __init__(self, backbone: Encoder, targets: Sequence[float], constants: Tensor) -> None:
        self.x = torch.zeros(())
        self.constants = constants
        layers = backbone.layers
        self.hooks = [layers[0].register_forward_pre_hook(self.start)]
        for layer, (before, after) in zip(layers, pairwise(targets), strict=True):
            ends = Ends.of(layer)
            for linear, target in zip(ends.linears, ((before + after) / 2, after), strict=True):
                self.hooks.append(linear.register_forward_hook(partial(self.grow, target, ends.share)))

    def start(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take the embedding."""
        self.x = inputs[0]

    def grow(self, target: float, share: float, linear: nn.Linear, _: object, out: Tensor) -> Tensor:
        """Scale a branch to the target, and move the four channels' mean by its bias."""
        plain = self.constants == 0
        scale = branch_scale(self.x[:, plain], share * out[:, plain], target)
        after = self.x + share * scale * out
        if linear.bias is None:
            linear.weight.mul_(scale)
            self.x = after
            return scale * out
        unit = after.square().mean(0).sqrt().median()
        shift = torch.where(plain, 0, self.constants * unit - after.mean(0))
        linear.weight.mul_(scale)
        linear.bias.mul_(scale).add_(shift)
        self.x = after + shift
        return scale * out + shift


def random_backbone(level: Level, tokens: Tensor, curve: Sequence[float], seed: int) -> Encoder:
    """Return a backbone whose random weights follow the recipe.

    Args:
        level: Shape of the backbone.
        tokens: What growth and constants are found on.
        curve: Root-mean-square of a trained residual stream after the embedding and after each layer.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    backbone = class_of(level).of_level(level).eval()
    assert isinstance(backbone, Encoder)
    depth = np.linspace(0, 1, backbone.num_layers + 1)
    targets = np.interp(depth, np.linspace(0, 1, len(curve)), curve).tolist()
    constants = torch.zeros(level.width)
    constants[torch.randperm(level.width)[: len(CONSTANTS)]] = torch.tensor(CONSTANTS)
    kept = MEAN_SHARE_KEPT if isinstance(backbone, ESM2) else 1.0
    backbone.embed_tokens.weight.mul_(targets[0] / kept)
    if isinstance(backbone, ESMC):
        backbone.embed_tokens.weight[:, constants != 0] = constants[constants != 0] * targets[-1]
    for layer, (before, after) in zip(backbone.layers, pairwise(targets), strict=True):
        for name, part in layer.named_modules():
            if name.endswith(("q_proj", "k_proj")) and isinstance(backbone, ESM2):
                part.weight.mul_(GAIN)
            elif name.endswith(("q_norm", "k_norm")):  # PyTorch's initial q and k have the variance 1/3
                part.weight.fill_(GAIN / sqrt(3))
        for norm, rms in zip(Ends.of(layer).norms, (before, (before + after) / 2), strict=True):
            growth = targets[-1] / rms if isinstance(backbone, ESMC) else 1.0
            size = (growth * constants.abs()).clamp(min=1)
            norm.weight.copy_(size.square().mean().sqrt() / size)
    calibration = Calibration(backbone, targets, constants)
    backbone(tokens, Packing.of(tokens != ALPHABET.padding_idx))
    for hook in calibration.hooks:
        hook.remove()
    return backbone


def reached(backbone: Encoder, tokens: Tensor) -> str:
    """Return in words what the recipe made of a backbone, on tokens that it was not calibrated on."""
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


def lifelike_family(
    family: str, fitted: Sequence[str], tokens: Tensor, most_layers: int, tokens_per_batch: int
) -> tuple[rd_torch.RDModel, Facts]:
    """Return a family's chain with such weights and fitted maps, and what the recipe reached.

    Args:
        family: Name of the family, one of `FAMILIES`.
        fitted: Sequences that the maps are fitted on; the first two calibrate the weights.
        tokens: Batch that what was reached is measured on.
        most_layers: Number of layers that a backbone has at the most.
        tokens_per_batch: Number of tokens in a batch of the fit.
    """
    *_, largest = rd_torch.RDModel.from_pretrained("esm2-rd-mini").family().values()
    assert isinstance(largest, ESM2)
    curve = [root_mean_square(x) for x in residual_stream(largest, tokens)[0]]
    calibrated = tokenize([sequence[:CALIBRATED_ON] for sequence in fitted[:2]], ALPHABET)
    facts: Facts = {"asked for": f"growth {curve[-1] / curve[0]:.3g}, channels {CONSTANTS[0]:.3g}"}
    backbones: dict[str, Encoder] = {}
    for seed, published in enumerate(FAMILIES[family]):
        level = replace(published, num_layers=min(published.shape[0], most_layers))
        backbones[level.name] = random_backbone(level, calibrated, curve, seed)
        facts[f"{level.name} reached"] = reached(backbones[level.name], tokens)
    model = rd_torch.fit(backbones, fitted, tokens_per_batch=tokens_per_batch)
    facts["residues fitted on"] = model.config.provenance["fit"]["residues"]
    facts["R^2"] = ", ".join(f"{each.r2:.3g}" for each in model.config.explained if each)
    return model, facts
