"""What `speed.py`, `memory.py` and `fit_cost.py` build alike: random ESM-2 models, contenders, token batches.

Weights are random, for neither speed nor memory depends on them. Our backbones share fair-esm's tensors.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from esm.model.esm2 import ESM2 as FairESM2
from torch import Tensor, nn

import rd_torch
from rd_torch.config import ALPHABET, ESM2_LEVELS, Level
from rd_torch.letters import Corrections
from rd_torch.reading import Fasta
from rd_torch.sequences import SPECIAL_TOKENS, cut_batches, normalize, tokenize

if TYPE_CHECKING:
    from transformers import EsmConfig, EsmModel

DTYPES = ("float32", "bfloat16", "float16")
QUANTILES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
MAX_RESIDUES = 1022
"""Residues at which proteins are cut: ESM-2 was trained on 1,024 tokens."""

CHAIN, FAIR, FAIR_FLOAT32 = "rd chain", "fair-esm", "fair-esm float32"
TRANSFORMERS, FAESM = "transformers sdpa", "faesm"


@dataclass(frozen=True)
class Batch:
    """A padded batch on the device, made before any clock runs.

    Attributes:
        tokens: `(batch, time)` token ids.
        mask: `(batch, time)` 1 at real tokens, 0 at padding, as transformers wants it.
        real: number of tokens that are no padding, `<cls>` and `<eos>` counted.
    """

    tokens: Tensor
    mask: Tensor
    real: int

    @classmethod
    def of(cls, sequences: Sequence[str], device: str) -> Batch:
        """The batch of normalised sequences."""
        tokens = tokenize(sequences)
        real = tokens != ALPHABET.padding_idx
        return cls(tokens.to(device), real.long().to(device), int(real.sum()))


@dataclass(frozen=True)
class Contender:
    """Somebody's way from a batch to the final embeddings, `(batch, time, width)`.

    Attributes:
        name: how the table calls it.
        encode: the way; None where it cannot run here, and then the name says why.
        parameters: of the transformer layers that run: two floating-point operations each, a token.
        prepared: bytes that preparing it took on the card.
    """

    name: str
    encode: Callable[[Batch], Tensor] | None
    parameters: int = 0
    prepared: int = 0


@dataclass(frozen=True)
class Family:
    """The chain, each of its backbones as a model of its own, and fair-esm's largest: one set of tensors."""

    chain: rd_torch.RDModel
    alone: dict[str, rd_torch.RDModel]
    fair: FairESM2

    @property
    def largest(self) -> str:
        """The name of the largest level."""
        return list(self.alone)[-1]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every script has: which models, where, and the result file."""
    parser.add_argument("--level", choices=list(ESM2_LEVELS), default="650M", help="the chain's last level")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)  # cuts every backbone, to try a script


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """The folder of the protein data."""
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("RD_TORCH_DATA"), help="folder of the protein data"
    )


def levels_until(arguments: argparse.Namespace) -> list[Level]:
    """The published levels up to `--level`, smallest first."""
    names = list(ESM2_LEVELS)
    levels = [ESM2_LEVELS[name] for name in names[: names.index(arguments.level) + 1]]
    layers = arguments.layers
    return [
        level if layers is None else replace(level, num_layers=min(layers, level.num_layers))
        for level in levels
    ]


def where(arguments: argparse.Namespace) -> str:
    """What a title says of the device, and of backbones that were cut to try a script."""
    device = "CPU" if torch.cuda.is_available() else "CPU (no GPU on this machine: not measured on one)"
    cut = f", backbones cut to {arguments.layers} layers: no result" if arguments.layers else ""
    return (torch.cuda.get_device_name() if arguments.device == "cuda" else device) + cut


def natural_proteins(data: Path | None) -> list[str]:
    """The validation proteins in file order, cut at 1,022 residues."""
    if data is None:
        raise SystemExit("expected the folder of the protein data in --data or RD_TORCH_DATA, got none")
    proteins = list(Fasta(Path(data) / "natural50_valid.fasta.xz"))
    changed = Corrections()
    return [normalize(protein, changed, max_length=MAX_RESIDUES).sequence for protein in proteins]


def sample(lengths: str, tokens: int, largest_budget: int, proteins: Sequence[str]) -> list[list[str]]:
    """Groups of sequences of alike lengths, as `--lengths` wants them."""
    if lengths.isdecimal():
        rng, size = random.Random(0), int(lengths)
        count = max(2, round(tokens / (size + SPECIAL_TOKENS)))
        return [["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=size)) for _ in range(count)]]
    low, high = (1, sys.maxsize) if lengths == "validation" else map(int, lengths.split("-"))
    ranked = sorted((protein for protein in proteins if low <= len(protein) <= high), key=len)
    wanted = max(tokens // len(QUANTILES), largest_budget)
    groups = []
    for quantile in QUANTILES:
        middle = int(quantile * len(ranked))
        count = min(len(ranked), max(1, round(wanted / (len(ranked[middle]) + SPECIAL_TOKENS))))
        start = min(max(0, middle - count // 2), len(ranked) - count)
        groups.append(ranked[start : start + count])
    return groups


def batches_of(groups: Sequence[Sequence[str]], budget: int, device: str) -> list[Batch]:
    """Each group cut into batches of at most `budget` tokens, as `embed` and `fit` cut their sequences."""
    cut = (batch for group in groups for batch in cut_batches(group, budget))
    return [Batch.of([sequence for _, sequence in batch], device) for batch in cut]


def random_fair(level: Level, device: str) -> FairESM2:
    """fair-esm's model with the weights that it draws itself."""
    with torch.device(device):
        return FairESM2(level.num_layers, level.width, level.attention_heads).eval()


def random_stages(levels: Sequence[Level], device: str) -> list[rd_torch.Stage]:
    """Maps of the shapes that a fit would give."""
    stages = []
    for smaller, larger in pairwise(levels):
        shapes = (smaller.width, larger.width), (larger.width,), (larger.width,)
        directions = (larger.width, larger.width - smaller.width)
        stages.append(rd_torch.Stage(*(torch.randn(s, device=device) * 0.02 for s in (*shapes, directions))))
    return stages


def random_family(levels: Sequence[Level], dtype: torch.dtype, device: str) -> Family:
    """The family with seeded weights, ready to run.

    The chain is converted first: its parameters are fair-esm's too, but the angles of the rotary
    embedding, which we keep in float32, become half precision in fair-esm's module alone.
    """
    torch.manual_seed(0)
    fair = {level.name: random_fair(level, device) for level in levels}
    chain = rd_torch.RDModel(fair, random_stages(levels, device)).eval().to(dtype)
    alone = {name: rd_torch.RDModel({name: part}, []).eval() for name, part in chain.backbones.items()}
    return Family(chain, alone, fair[levels[-1].name].to(dtype))


def random_transformers(level: Level, dtype: torch.dtype, device: str) -> EsmModel:
    """The model of transformers, with scaled-dot-product attention."""
    from transformers import EsmModel  # here, for it takes longer to import than some benchmarks to run

    with torch.device(device):
        model = EsmModel(_config(level, attn_implementation="sdpa"), add_pooling_layer=False)
    return model.eval().to(dtype)


def random_faesm(level: Level, dtype: torch.dtype, device: str) -> nn.Module:
    """The model of FAESM, with its flash attention where that is installed and the dtype is a half one."""
    from faesm.esm import FAEsmModel, flash_attn_installed

    config = _config(level)
    config.use_fa = flash_attn_installed and dtype != torch.float32
    with torch.device(device):
        return FAEsmModel(config, add_pooling_layer=False).eval().to(dtype)


def _config(level: Level, **options: str) -> EsmConfig:
    """The level as transformers describes it."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=level.width,
        intermediate_size=4 * level.width, num_hidden_layers=level.num_layers, layer_norm_eps=1e-5,
        num_attention_heads=level.attention_heads, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip


def layer_parameters(model: nn.Module) -> int:
    """Parameters inside transformer layers: those of matrix products, all but for a thousandth."""
    layers = (
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("layers", "layer") and isinstance(module, nn.ModuleList)
    )
    return sum(parameter.numel() for stack in layers for parameter in stack.parameters())


def own(name: str, model: rd_torch.RDModel) -> Contender:
    """One of ours; on CUDA prepared as the package offers it."""
    prepared = 0
    if next(model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        model.prepare_inference()
        prepared = torch.cuda.memory_allocated() - before
    return Contender(name, lambda batch: model.encode(batch.tokens), layer_parameters(model), prepared)


def fair_contender(name: str, model: FairESM2) -> Contender:
    """fair-esm, asked for its last layer. It computes logits too and cannot be told not to."""
    last = model.num_layers
    return Contender(
        name,
        lambda batch: model(batch.tokens, repr_layers=[last])["representations"][last],
        layer_parameters(model),
    )


def masked_contender(name: str, model: nn.Module) -> Contender:
    """A model of transformers' call."""
    return Contender(
        name,
        lambda batch: model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state,
        layer_parameters(model),
    )


def faesm_contender(level: Level, dtype: torch.dtype, device: str) -> Contender:
    """FAESM if it runs here: it reaches into transformers, and not into every version of it."""
    try:
        contender = masked_contender(FAESM, random_faesm(level, dtype, device))
        with torch.inference_mode():
            contender.encode(Batch.of(["MKV", "MKVL"], device))
    except ModuleNotFoundError:
        return Contender(f"{FAESM}: not installed here", None)
    except Exception as error:
        return Contender(f"{FAESM}: does not run here ({type(error).__name__})", None)
    return contender


def contenders(
    levels: Sequence[Level], dtype: torch.dtype, device: str, without: Collection[str] = ()
) -> Iterator[Contender]:
    """The chain, each of our backbones alone, then what people use in the largest level's shape."""
    family = random_family(levels, dtype, device)
    yield own(CHAIN, family.chain)
    for level, model in family.alone.items():
        yield own(alone(level), model)
    yield fair_contender(FAIR, family.fair)
    if dtype != torch.float32 and FAIR_FLOAT32 not in without:
        yield fair_contender(FAIR_FLOAT32, random_fair(levels[-1], device))
    if TRANSFORMERS not in without:
        yield masked_contender(TRANSFORMERS, random_transformers(levels[-1], dtype, device))
    if device == "cuda" and FAESM not in without:
        yield faesm_contender(levels[-1], dtype, device)


def alone(level: str) -> str:
    """How the table calls one of our backbones by itself."""
    return f"own {level} alone"
