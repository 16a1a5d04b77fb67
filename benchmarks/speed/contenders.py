"""The models that are compared: ours, and those of the libraries that people use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from esm.model.esm2 import ESM2 as FairESM2
from torch import Tensor, nn

import rd_torch
from benchmarks.speed.batches import Batch
from benchmarks.speed.models import random_faesm, random_fair, random_family, random_transformers
from rd_torch.levels import Level

CHAIN, FAIR, FAIR_FLOAT32 = "rd chain", "fair-esm", "fair-esm float32"
TRANSFORMERS, FAESM = "transformers sdpa", "faesm"


@dataclass(frozen=True)
class Contender:
    """Somebody's way from a batch to the final embeddings, `(batch, time, width)`.

    Attributes:
        name: Name in the table.
        encode: The way; None where it cannot run here, and then the name says why.
        parameters: Number of parameters in the transformer layers that run: two floating-point operations
            each, a token.
        prepared: Number of bytes that preparing it took on the GPU.
    """

    name: str
    encode: Callable[[Batch], Tensor] | None
    parameters: int = 0
    prepared: int = 0

    def __call__(self, batch: Batch) -> Tensor:
        """Return the final embeddings of a batch."""
        if self.encode is None:
            raise TypeError(f"expected a contender that runs here, got {self.name}")
        return self.encode(batch)


def alone(level: str) -> str:
    """Return the name of one of our backbones by itself in the table."""
    return f"own {level} alone"


def layer_parameters(model: nn.Module) -> int:
    """Return the number of parameters inside transformer layers: all but a thousandth are matrices."""
    layers = (
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("layers", "layer") and isinstance(module, nn.ModuleList)
    )
    return sum(parameter.numel() for stack in layers for parameter in stack.parameters())


def own(name: str, model: rd_torch.RDModel) -> Contender:
    """Return one of ours; on CUDA prepared as the package offers it."""
    prepared = 0
    if next(model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        model.prepare_inference()
        prepared = torch.cuda.memory_allocated() - before
    return Contender(name, lambda batch: model.encode(batch.tokens), layer_parameters(model), prepared)


def fair_contender(name: str, model: FairESM2) -> Contender:
    """Return fair-esm, asked for its last layer; it computes logits too and cannot be told not to."""
    last = model.num_layers
    return Contender(
        name,
        lambda batch: model(batch.tokens, repr_layers=[last])["representations"][last],
        layer_parameters(model),
    )


def masked_contender(name: str, model: nn.Module) -> Contender:
    """Return a model that is called as those of transformers are."""
    return Contender(
        name,
        lambda batch: model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state,
        layer_parameters(model),
    )


def faesm_contender(level: Level, dtype: torch.dtype, device: str) -> Contender:
    """Return FAESM if it runs here: it reaches into transformers, and not into every version of it."""
    try:
        contender = masked_contender(FAESM, random_faesm(level, dtype, device))
        with torch.inference_mode():
            contender(Batch.of(["MKV", "MKVL"], device))
    except ModuleNotFoundError:
        return Contender(f"{FAESM}: not installed here", None)
    except Exception as error:
        return Contender(f"{FAESM}: does not run here ({type(error).__name__})", None)
    return contender


def contenders(
    levels: Sequence[Level], dtype: torch.dtype, device: str, without: Collection[str] = ()
) -> Iterator[Contender]:
    """Yield the chain, each of our backbones alone, then what people use in the largest level's shape.

    For ESM-C that is transformers alone.

    Args:
        levels: Shapes of the backbones, smallest first.
        dtype: Type of the weights.
        device: Device that holds everything.
        without: Names of contenders to leave out.
    """
    family = random_family(levels, dtype, device)
    yield own(CHAIN, family.chain)
    for level, model in family.alone.items():
        yield own(alone(level), model)
    if not isinstance(family.theirs, FairESM2):
        yield masked_contender(TRANSFORMERS, family.theirs)
        return
    yield fair_contender(FAIR, family.theirs)
    if dtype != torch.float32 and FAIR_FLOAT32 not in without:
        yield fair_contender(FAIR_FLOAT32, random_fair(levels[-1], device))
    if TRANSFORMERS not in without:
        yield masked_contender(TRANSFORMERS, random_transformers(levels[-1], dtype, device))
    if device == "cuda" and FAESM not in without:
        yield faesm_contender(levels[-1], dtype, device)
