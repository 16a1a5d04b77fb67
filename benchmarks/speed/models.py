"""Models with random weights of the published shapes, for neither speed nor memory depends on the weights.

Our backbones share the tensors of fair-esm's or, where they are ESM-C's, of transformers'.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from esm.model.esm2 import ESM2 as FairESM2
from torch import nn

import rd_torch
from rd_torch.backbone import hidden_width
from rd_torch.levels import ESM2_LEVELS, ESMC_LEVELS, Level

if TYPE_CHECKING:
    from transformers import EsmcModel, EsmConfig, EsmModel

Levels = Mapping[str, Level]


def add_model_options(
    parser: argparse.ArgumentParser, level: str = "650M", families: Sequence[Levels] = (ESM2_LEVELS,)
) -> None:
    """Let a parser take which models run, and where.

    Args:
        parser: The parser.
        level: The last level of the chain, where nobody names one.
        families: The levels that may be asked for, family by family.
    """
    parser.add_argument(
        "--level",
        choices=[name for levels in families for name in levels],
        default=level,
        help="Last level of the chain. [default: %(default)s]",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Device that runs. [default: %(default)s]"
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="Number of layers that every backbone is cut to, to try a script; its figures are no result.",
    )


def levels_until(arguments: argparse.Namespace) -> list[Level]:
    """Return the published levels up to `--level`, smallest first, cut to `--layers`."""
    published = ESM2_LEVELS if arguments.level in ESM2_LEVELS else ESMC_LEVELS
    names = list(published)
    levels = [published[name] for name in names[: names.index(arguments.level) + 1]]
    layers = arguments.layers
    return [
        level if layers is None else replace(level, num_layers=min(layers, level.num_layers))
        for level in levels
    ]


def where(arguments: argparse.Namespace) -> str:
    """Return what a title says of the device, and of backbones that were cut to try a script."""
    device = "CPU" if torch.cuda.is_available() else "CPU (no GPU on this machine: not measured on one)"
    cut = f", backbones cut to {arguments.layers} layers: no result" if arguments.layers else ""
    return (torch.cuda.get_device_name() if arguments.device == "cuda" else device) + cut


@dataclass(frozen=True)
class Family:
    """A chain, and models of its parts that share its tensors.

    Attributes:
        chain: The chain itself.
        alone: By level, its backbone as a model of its own.
        theirs: The largest backbone as fair-esm's model or, if it is ESM-C's, as transformers'.
    """

    chain: rd_torch.RDModel
    alone: dict[str, rd_torch.RDModel]
    theirs: nn.Module


def random_fair(level: Level, device: str) -> FairESM2:
    """Return fair-esm's model with the weights that it draws itself."""
    with torch.device(device):
        return FairESM2(level.num_layers, level.width, level.attention_heads).eval()


def random_stages(levels: Sequence[Level], device: str) -> list[rd_torch.Stage]:
    """Return maps of the shapes that a fit would give."""
    stages = []
    for smaller, larger in pairwise(levels):
        p, q = smaller.width, larger.width
        shapes = (p, q), (q,), (q,), (q, q - p)
        W, b, m, V = (torch.randn(shape, device=device) * 0.02 for shape in shapes)
        stages.append(rd_torch.Stage(W, b, m, V))
    return stages


def random_family(levels: Sequence[Level], dtype: torch.dtype, device: str) -> Family:
    """Return a family with seeded weights, ready to run.

    The chain is converted first: its parameters are fair-esm's too, but the angles of the rotary
    embedding, which we keep in float32, become half precision in fair-esm's module alone.

    Args:
        levels: Shapes of the backbones, smallest first.
        dtype: Type of the backbones.
        device: Device that holds everything.
    """
    torch.manual_seed(0)
    is_esmc = levels[-1].family == rd_torch.ESMC.family
    theirs = {level.name: (random_esmc if is_esmc else random_fair)(level, device) for level in levels}
    ours = {level.name: shared_esmc(level, theirs[level.name]) for level in levels} if is_esmc else theirs
    chain = rd_torch.RDModel(ours, random_stages(levels, device)).eval().to(dtype)
    alone = {name: rd_torch.RDModel({name: part}, []).eval() for name, part in chain.backbones.items()}
    return Family(chain, alone, theirs[levels[-1].name].to(dtype))


def random_esmc(level: Level, device: str) -> EsmcModel:
    """Return transformers' ESM-C with the weights that it draws itself, with scaled-dot-product attention."""
    from transformers import EsmcConfig, EsmcModel

    config = EsmcConfig(
        hidden_size=level.width,
        intermediate_size=hidden_width(level.width),
        num_hidden_layers=level.num_layers,
        num_attention_heads=level.attention_heads,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return EsmcModel(config).eval()


def shared_esmc(level: Level, theirs: nn.Module) -> rd_torch.ESMC:
    """Return our ESM-C around the tensors of transformers'."""
    return rd_torch.ESMC.from_tensors(level, dict(theirs.named_parameters()))


def random_transformers(level: Level, dtype: torch.dtype, device: str) -> EsmModel:
    """Return the model of transformers, with scaled-dot-product attention."""
    from transformers import EsmModel  # here, for it takes longer to import than some benchmarks to run

    with torch.device(device):
        model = EsmModel(_config(level, attn_implementation="sdpa"), add_pooling_layer=False)
    return model.eval().to(dtype)


def random_faesm(level: Level, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the model of FAESM, with flash attention where that is installed and the dtype is a half one."""
    from faesm.esm import FAEsmModel, flash_attn_installed

    config = _config(level)
    config.use_fa = flash_attn_installed and dtype != torch.float32
    with torch.device(device):
        return FAEsmModel(config, add_pooling_layer=False).eval().to(dtype)


def _config(level: Level, **options: str) -> EsmConfig:
    """Return a level as transformers describes it."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=level.width,
        intermediate_size=4 * level.width, num_hidden_layers=level.num_layers, layer_norm_eps=1e-5,
        num_attention_heads=level.attention_heads, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
