"""Random weights of ESM-2's shapes whose numbers behave like a trained model's.

Rounding errors depend on the weights, so plain random ones would not do. The recipe:

- PyTorch's initial weights from a seed for each level, `q_proj` and `k_proj` doubled, so that a query attends
  to about as many keys as in the shipped family's largest backbone;
- each layer's `out_proj` and `fc2`, weights and biases, scaled so that the root-mean-square of the residual
  stream follows that of the shipped family's largest backbone, after the embedding and after each layer,
  interpolated over relative depth; attention goes half of each layer's way;
- four random channels, which the growth leaves out, hold constants of both signs, 50 times the median
  channel's root-mean-square, set by the biases of `out_proj` and `fc2`. The LayerNorms before attention and
  before the feed-forward block have weights that bring all channels to unit size; the last one's are ones.

Growth and constants are closed forms, found layer after layer on the first 126 residues of two proteins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rd_torch
from rd_torch.backbone import ESM2, MEAN_SHARE_KEPT, Packing, tokenize
from rd_torch.levels import ALPHABET, ESM2_LEVELS, Level

LEVELS = ("8M", "35M", "150M", "650M")
GAIN = 2.0
CONSTANTS = (50.0, -50.0, 50.0, -50.0)
CALIBRATED_ON = 126
"""Number of residues: with `<cls>` and `<eos>` 128 tokens."""

Facts = dict[str, Any]


def root_mean_square(x: Tensor) -> float:
    """Return the root-mean-square of all numbers in a tensor."""
    return float(x.square().mean().sqrt())


def residual_stream(backbone: ESM2, tokens: Tensor) -> tuple[list[Tensor], float]:
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

    def __init__(self, backbone: ESM2, targets: Sequence[float], constants: Tensor) -> None:
        self.x = torch.zeros(())
        self.constants = constants
        layers = backbone.layers
        self.hooks = [layers[0].register_forward_pre_hook(self.start)]
        for layer, (before, after) in zip(layers, pairwise(targets), strict=True):
            for linear, target in ((layer.self_attn.out_proj, (before + after) / 2), (layer.fc2, after)):
                self.hooks.append(linear.register_forward_hook(partial(self.grow, target)))

    def start(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take the embedding."""
        self.x = inputs[0]

    def grow(self, target: float, linear: nn.Linear, _: object, out: Tensor) -> Tensor:
        """Scale a branch to the target, and move the four channels' mean by its bias."""
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
    """Return a backbone whose random weights follow the recipe.

    Args:
        level: Shape of the backbone.
        tokens: What growth and constants are found on.
        curve: Root-mean-square of a trained residual stream after the embedding and after each layer.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    backbone = ESM2(*level.shape).eval()
    depth = np.linspace(0, 1, backbone.num_layers + 1)
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
    fitted: Sequence[str], tokens: Tensor, most_layers: int, tokens_per_batch: int
) -> tuple[rd_torch.RDModel, Facts]:
    """Return the 650M chain with such weights and fitted maps, and what the recipe reached.

    Args:
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
    backbones: dict[str, ESM2] = {}
    for seed, name in enumerate(LEVELS):
        layers = min(ESM2_LEVELS[name].shape[0], most_layers)
        level = replace(ESM2_LEVELS[name], num_layers=layers)
        backbones[name] = random_backbone(level, calibrated, curve, seed)
        facts[f"{name} reached"] = reached(backbones[name], tokens)
    model = rd_torch.fit(backbones, fitted, tokens_per_batch=tokens_per_batch)
    facts["residues fitted on"] = model.config.provenance["fit"]["residues"]
    facts["R^2"] = ", ".join(f"{each.r2:.3g}" for each in model.config.explained if each)
    return model, facts
