"""What `prepare_inference` makes of a chain: an engine that has given the reference's numbers here, or none.

The engine's kernels are generated, fused and recorded on the device at hand, by compilers and drivers that
nobody could try beforehand. So it runs two probe batches first, beside the modules themselves, which are the
reference; what it says may be further from them only as half precision is from float32. An engine that says
something else, or fails in whatever way, is left out with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone.attention import RotaryEmbedding
from rd_torch.backbone.engine import Engine
from rd_torch.backbone.esm2 import ESM2
from rd_torch.backbone.layer import SelfAttention, TransformerLayer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import BranchNorm, ResidualNorm
from rd_torch.backbone.tokens import is_real, tokenize

UBIQUITIN: Final = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
PROBES: Final = (
    (UBIQUITIN * 3, "M", UBIQUITIN[20:60], UBIQUITIN, "XBUZO", UBIQUITIN[::-1] * 2),
    (UBIQUITIN[::-1] * 3, "G", UBIQUITIN[10:50], UBIQUITIN[::-1], "OUXZB", UBIQUITIN * 2),
)
"""Two batches of unequal lengths, the same in both, so that the second is a replay of the first's graph."""


class Limit(NamedTuple):
    """How far an embedding may be from the reference's over a batch.

    Attributes:
        error: mean of the absolute differences, in standard deviations of the reference's features.
        cosine: smallest cosine of a token's two embeddings, both less the reference's mean.
    """

    error: float
    cosine: float


LIMITS: Final = {
    torch.float16: Limit(0.00683, 0.9998095),
    torch.bfloat16: Limit(0.0575, 0.9889209),
    torch.float32: Limit(2e-5, 0.9999999),
    torch.float64: Limit(2e-5, 0.9999999),
}
"""By the backbones' dtype: what half precision with a float32 residual stream costs at the most.

The half types' are the worst of any level in `benchmarks/results/half_precision_*.json`.
"""


PLAIN: Final = frozenset(
    {
        ESM2,
        TransformerLayer,
        SelfAttention,
        nn.Linear,
        RotaryEmbedding,
        ResidualNorm,
        BranchNorm,
        nn.Embedding,
        nn.ModuleList,
    }
)
"""The modules that the engine knows: others may do what it would leave out or freeze into a graph."""


def obstacle(family: Mapping[str, ESM2]) -> str | None:
    """What the engine would pass over in the backbones: modules of other kinds, hooks; None where nothing.

    An adapter of PEFT's can be switched off without any tensor changing, which a recorded graph would not
    notice; hooks would not run.
    """
    for level, backbone in family.items():
        for name, module in _running(backbone):
            place = f"{level}.{name}".rstrip(".")
            kind = type(module)
            if kind not in PLAIN:
                return f"{place} is a {kind.__module__}.{kind.__name__}, not one of ESM-2's own modules"
            if _is_hooked(module):
                return f"{place} has hooks"
    return None


def _running(backbone: ESM2) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a backbone that run for its embedding, by name: all but its heads."""
    for name, module in backbone.named_modules():
        if not name.startswith(("lm_head", "contact_head")):
            yield name, module


def _is_hooked(module: nn.Module) -> bool:
    """Whether something else than the class's own `forward` runs when the module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class Prepared:
    """A chain's backbones, and the engine that may run in their place while they stay as they are.

    Args:
        family: the backbones by level, smallest first, on one device.
    """

    def __init__(self, family: Mapping[str, ESM2]) -> None:
        self._parts = [
            (container, name, part)
            for backbone in family.values()
            for module in backbone.modules()
            for container in (module._parameters, module._buffers, module._modules)
            for name, part in container.items()
        ]
        self._tensors = [part for _, _, part in self._parts if isinstance(part, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._modules = [module for backbone in family.values() for _, module in _running(backbone)]
        self._engine: Engine | None = None
        reason = obstacle(family)
        if reason is None:
            try:
                engine = Engine(family)
                reason = difference_from_reference(engine, family)
            except Exception as error:  # compilers, drivers and allocators fail in ways of their own
                reason = _in_one_line(error)
        if reason is None:
            self._engine = engine
        else:
            _warn_of(reason)

    @property
    def is_current(self) -> bool:
        """Whether modules and tensors are what and where they were: graphs would not notice others.

        Nor would hooks run that somebody has registered since.
        """
        if self._engine is not None and any(map(_is_hooked, self._modules)):
            return False
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        return addresses == self._addresses and all(
            container.get(name) is part for container, name, part in self._parts
        )

    def __call__(self, tokens: Tensor, packing: Packing, levels: int) -> dict[str, Tensor] | None:
        """Packed raw embeddings of the first `levels` backbones; None where the reference has to run.

        Raises:
            torch.OutOfMemoryError: for a batch that the device has no memory for.
        """
        if self._engine is None:
            return None
        try:
            return self._engine(tokens, packing, levels)
        except torch.OutOfMemoryError:
            raise  # smaller batches are the cure, as on the reference path
        except Exception as error:  # as above
            self._engine = None
            _warn_of(_in_one_line(error))
            return None


@torch.inference_mode()
def difference_from_reference(engine: Engine, family: Mapping[str, ESM2]) -> str | None:
    """Runs the probes on both paths; says where they differ, and None where they do not."""
    weight = next(iter(family.values())).embed_tokens.weight
    limit = LIMITS[weight.dtype]
    if weight.dtype == torch.float32 and not hardware.has_exact_float32(weight.device):
        limit = LIMITS[torch.float16]  # of as many bits as TF32
    for probe in PROBES:
        tokens = tokenize(probe).to(weight.device)
        packing = Packing.of(is_real(tokens))
        got = engine(tokens, packing, len(family))
        for level, backbone in family.items():
            error, cosine = _compare(got[level], backbone(tokens, packing))
            if not (error <= limit.error and cosine >= limit.cosine):
                return (
                    f"at level {level} it is {error:.2g} standard deviations from the reference on average, "
                    f"with a smallest cosine of {cosine:.4f}, where {limit.error:.2g} and {limit.cosine:.4f} "
                    "are allowed"
                )
    return None


def _compare(got: Tensor, expected: Tensor) -> Limit:
    """The distance of two `(tokens, width)` embeddings, computed in float64 on the CPU."""
    got, expected = got.cpu().double(), expected.cpu().double()
    centre, unit = expected.mean(0), expected.var(0).mean().sqrt()
    cosines = torch.cosine_similarity(got - centre, expected - centre, dim=-1)
    return Limit(float((got - expected).abs().mean() / unit), float(cosines.min()))


def _in_one_line(error: Exception) -> str:
    """The error's kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"it fails with {type(error).__name__}" + (f": {said[0]}" if said else "")


def _warn_of(reason: str) -> None:
    warnings.warn(
        f"the prepared path is not used on this device, because {reason}; the model runs on the reference "
        "path, whose results are right",
        stacklevel=4,
    )
