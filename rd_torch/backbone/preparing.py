"""Prepare a chain for inference: make an engine, and use it only if it gives the modules' numbers.

The engine's kernels are generated, fused and recorded on the device at hand, by compilers and drivers that
nobody could try beforehand. So the engine first runs two probe batches beside the modules themselves, which
are the reference. Its embeddings may differ from theirs as much as half precision differs from float32. An
engine whose embeddings differ more, or that fails in whatever way, is left out with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone.backbone import Backbone
from rd_torch.backbone.encoder import Encoder
from rd_torch.backbone.engine import Engine
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import BranchNorm, ResidualNorm
from rd_torch.backbone.running import run_backbones
from rd_torch.backbone.tokens import UBIQUITIN, is_real, tokenize
from rd_torch.levels import TRANSFORMERS_FAMILY

PROBES: Final = (
    (UBIQUITIN * 3, "M", UBIQUITIN[20:60], UBIQUITIN, "XBUZO", UBIQUITIN[::-1] * 2),
    (UBIQUITIN[::-1] * 3, "G", UBIQUITIN[10:50], UBIQUITIN[::-1], "OUXZB", UBIQUITIN * 2),
)
"""Two batches of the same unequal lengths, so that the second one replays the graph of the first."""


class Limit(NamedTuple):
    """How far embeddings of a batch may be from the reference's.

    Attributes:
        error: mean of the absolute differences, in standard deviations of the reference's features.
        cosine: smallest cosine between a token's two embeddings, after the reference's mean is subtracted.
    """

    error: float
    cosine: float


LIMITS: Final = {
    torch.float16: Limit(0.00683, 0.9998095),
    torch.bfloat16: Limit(0.0575, 0.9889209),
    torch.float32: Limit(2e-5, 0.9999999),
    torch.float64: Limit(2e-5, 0.9999999),
}
"""The largest error and smallest cosine that count as rounding, by the backbones' dtype.

Those of half types are the worst that any level had, with a float32 residual stream, in
`benchmarks/results/half_precision_*.json`. For float32 the error is what all tests allow it (2e-5), and the
cosine a choice.
"""

COMMON_MODULES: Final = frozenset({nn.Linear, ResidualNorm, BranchNorm, nn.Embedding, nn.ModuleList})
"""The classes of modules that every family has."""


def obstacle(family: Mapping[str, Backbone]) -> str | None:
    """Return what in the backbones an engine or an exported file would not follow, as a sentence.

    These are hooks, which would not run, and modules that are not the family's own. An adapter of PEFT, for
    example, can be switched off while all tensors stay the same, which a recorded graph would not notice.

    Args:
        family: backbones by level.

    Returns:
        A sentence that names the first such module, without a capital and a full stop; None where there is
        none.
    """
    for level, backbone in family.items():
        if backbone.family == TRANSFORMERS_FAMILY:
            return f"level {level} is a model of transformers'"
        kind = type(backbone)
        own = vars(kind).get("own_modules", frozenset())  # not inherited: a subclass may compute otherwise
        known = COMMON_MODULES | own | ({kind} if own else set())
        for name, module in _encoder_modules(backbone):
            place = f"{level}.{name}".rstrip(".")
            if (part := type(module)) not in known:
                named = f"{part.__module__}.{part.__name__}"
                return f"{place} is a {named}, not one of the family's own modules"
            if _is_hooked(module):
                return f"{place} has hooks"
    return None


def _encoder_modules(backbone: Backbone) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of a backbone that run for its embedding, which are all but its heads."""
    for name, module in backbone.named_modules():
        if name.partition(".")[0] not in backbone.heads:
            yield name, module


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of the module runs anything else than the `forward` of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class Prepared:
    """The engine of a chain's backbones, if there is one, and whether it may still run in their place.

    Args:
        family: backbones by level, smallest first, on one device.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.
    """

    def __init__(self, family: Mapping[str, Backbone], *, final_norm: bool = True) -> None:
        # Modules and tensors, and the dictionaries that hold them, where `is_current` looks for others.
        self._parts = [
            (container, name, part)
            for backbone in family.values()
            for module in backbone.modules()
            for container in (module._parameters, module._buffers, module._modules)
            for name, part in container.items()
        ]
        self._tensors = [part for _, _, part in self._parts if isinstance(part, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._modules = [module for backbone in family.values() for _, module in _encoder_modules(backbone)]
        self._engine: Engine | None = None
        reason = obstacle(family)
        entrances = {(type(each), each.facts.get("token_dropout")) for each in family.values()}
        if reason is None and len(entrances) > 1:
            reason = "tokens enter the backbones in different ways"
        if reason is None:
            encoders = cast("Mapping[str, Encoder]", family)  # others have obstacles
            try:
                engine = Engine(encoders, final_norm=final_norm)
                reason = difference_from_reference(engine, encoders, final_norm=final_norm)
            except Exception as error:  # compilers, drivers and allocators fail in ways of their own
                reason = _in_one_line(error)
        if reason is None:
            self._engine = engine
        else:
            _warn_of(reason)

    @property
    def is_current(self) -> bool:
        """Whether modules and tensors are those that the engine was made from, where they were then.

        A graph would go on with the old ones. Hooks that somebody has registered since would not run.
        """
        if self._engine is not None and any(map(_is_hooked, self._modules)):
            return False
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        return addresses == self._addresses and all(
            container.get(name) is part for container, name, part in self._parts
        )

    def __call__(self, tokens: Tensor, packing: Packing, count: int) -> dict[str, Tensor] | None:
        """Run the backbones of the first levels of the family, if there is an engine.

        Args:
            tokens: `(batch, time)` ids.
            packing: packing of the tokens that are no padding.
            count: number of levels.

        Returns:
            `(tokens, width)` packed raw embeddings by level; None where the modules have to run.

        Raises:
            torch.OutOfMemoryError: for a batch that the device has no memory for.
        """
        if self._engine is None:
            return None
        try:
            return self._engine(tokens, packing, count)
        except torch.OutOfMemoryError:
            raise  # the caller halves the batch, as on the reference path
        except Exception as error:  # as above; what fails once is not tried again
            self._engine = None
            _warn_of(_in_one_line(error))
            return None


@torch.inference_mode()
def difference_from_reference(
    engine: Engine, family: Mapping[str, Encoder], *, final_norm: bool = True
) -> str | None:
    """Run the probes on both paths, and compare the embeddings.

    Args:
        engine: engine to try.
        family: backbones by level, which are the reference.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.

    Returns:
        A sentence that says where the two differ too much; None where they do not.
    """
    first = next(iter(family.values()))
    weight = first.embed_tokens.weight
    limit = LIMITS[weight.dtype]
    if weight.dtype == torch.float32 and not hardware.has_exact_float32(weight.device):
        limit = LIMITS[torch.float16]  # TF32 has as many bits as float16
    for probe in PROBES:
        tokens = tokenize(probe, first.alphabet).to(weight.device)
        packing = Packing.of(is_real(tokens, first.alphabet))
        got = engine(tokens, packing, len(family))
        for level, expected in run_backbones(family, tokens, packing, final_norm=final_norm).items():
            error, cosine = _compare(got[level], expected)
            if not (error <= limit.error and cosine >= limit.cosine):  # so put that NaN fails too
                return (
                    f"at level {level} it is {error:.2g} standard deviations from the reference on average, "
                    f"with a smallest cosine of {cosine:.4f}, where {limit.error:.2g} and {limit.cosine:.4f} "
                    "are allowed"
                )
    return None


def _compare(got: Tensor, expected: Tensor) -> Limit:
    """Return the distance of two `(tokens, width)` embeddings, computed in float64 on the CPU."""
    got, expected = got.cpu().double(), expected.cpu().double()
    centre, unit = expected.mean(0), expected.var(0).mean().sqrt()
    cosines = torch.cosine_similarity(got - centre, expected - centre, dim=-1)
    return Limit(float((got - expected).abs().mean() / unit), float(cosines.min()))


def _in_one_line(error: Exception) -> str:
    """Return a sentence with the error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"it fails with {type(error).__name__}" + (f": {lines[0]}" if lines else "")


def _warn_of(reason: str) -> None:
    warnings.warn(
        f"the fast path (prepare_inference) is not used on this device, because {reason}; the model runs "
        "without it, and its results are right",
        stacklevel=4,
    )
