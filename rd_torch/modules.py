"""What this package asks of any PyTorch module: where its tensors are, its mode, its typed parts.

Other libraries may keep tensors elsewhere, on a disk for example, and fetch them for each call. accelerate's
`cpu_offload`, `disk_offload` and `dispatch_model` do so by hooks: between calls a parameter is on the meta
device, with the right shape and dtype but without numbers. So only the module that owns a weight reads it, in
its own `forward`; whatever else needs to know about weights asks here. Quantisers put other things than plain
tensors into state dicts; `plain_parts` takes those apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)

if TYPE_CHECKING:

    class Modules(nn.ModuleDict, Generic[Part]):
        """An `nn.ModuleDict` whose modules are of one known type."""

        def __getitem__(self, key: str) -> Part: ...
        def values(self) -> ValuesView[Part]: ...
        def items(self) -> ItemsView[str, Part]: ...

    class ModuleRow(nn.ModuleList, Generic[Part]):
        """An `nn.ModuleList` whose modules are of one known type."""

        def __getitem__(self, index: int) -> Part: ...  # type: ignore[override]  # slices are not used
        def __iter__(self) -> Iterator[Part]: ...
else:  # PyTorch's own classes, which other libraries look for
    Modules, ModuleRow = nn.ModuleDict, nn.ModuleList


def modules_of(parts: Mapping[str, Part]) -> Modules[Part]:
    """Makes an `nn.ModuleDict` whose modules type checkers know."""
    return cast("Modules[Part]", nn.ModuleDict(parts))


def row_of(parts: Iterable[Part]) -> ModuleRow[Part]:
    """Makes an `nn.ModuleList` whose modules type checkers know."""
    return cast("ModuleRow[Part]", nn.ModuleList(parts))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts every module inside the given ones into `eval` mode, and back into its own mode at the end.

    Backbones have no dropout of their own, but what other libraries put into them, such as LoRA, may have.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def device_of(module: nn.Module) -> torch.device:
    """The device that a module takes its inputs on: of its first tensor that is somewhere.

    Where hooks keep all of them elsewhere, it is the device that the hooks fetch them to.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("meta")


def is_fetched(module: nn.Module) -> bool:
    """Whether there are hooks that may fetch the module's tensors when it is called."""
    return any(part._forward_pre_hooks or hasattr(part, "_hf_hook") for part in module.modules())


def is_plain(value: Any) -> bool:
    """Whether a state dict's value is a plain tensor: not a quantised or sharded one, or something else."""
    return isinstance(value, Tensor) and not value.is_quantized and not hasattr(value, "__tensor_flatten__")


def plain_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The numbers of a state dict's value, as plain tensors by names of their own.

    A plain tensor is its own part. Tensors of torchao's have several, and so have PyTorch's quantised ones
    and what its quantised layers pack. What is no number is given as the bytes of what it is called: a dtype,
    or how a tensor of torchao's treats what it is multiplied by.
    """
    if hasattr(value, "full_tensor"):  # a shard of FSDP2's: every process has to take part
        value = value.full_tensor()
    if isinstance(value, tuple | list):
        for place, each in enumerate(value):
            yield from plain_parts(f"{name}.{place}", each)
    elif not isinstance(value, Tensor):
        called = re.sub(r" at 0x[0-9a-f]+", "", str(value))  # places in memory are another run's
        yield name, torch.tensor(list(called.encode()), dtype=torch.uint8)
    elif value.is_quantized:
        yield f"{name}.integers", value.int_repr()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{name}.scale", torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
        else:
            yield f"{name}.scales", value.q_per_channel_scales()
            yield f"{name}.zeros", value.q_per_channel_zero_points()
    elif hasattr(value, "__tensor_flatten__"):
        names, facts = value.__tensor_flatten__()
        yield from plain_parts(f"{name}.facts", f"{type(value).__qualname__} {facts}")
        for each in names:
            yield from plain_parts(f"{name}.{each}", getattr(value, each))
    else:
        yield name, value


class StateDict(Mapping[str, Tensor]):
    """A module's state dict. What hooks of accelerate's keep elsewhere is fetched when it is asked for.

    So no more than one module's tensors need be in memory at once.

    Args:
        module: whose tensors.
        keep: tells from its name whether a tensor is wanted.
    """

    def __init__(self, module: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> None:
        self._module = module
        self._state = {name: tensor for name, tensor in module.state_dict().items() if keep(name)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            KeyError: for a name that is not there.
            ValueError: for a tensor that has no numbers anywhere.
        """
        tensor = self._state[name]
        return self._fetched(name) if isinstance(tensor, Tensor) and tensor.is_meta else tensor

    def require_plain(self, place: str) -> None:
        """Raises a ValueError unless all of it are plain tensors, which files of weights hold.

        Args:
            place: whose state this is, for the message.
        """
        for name, value in self._state.items():
            if not is_plain(value):
                kind = f"{type(value).__module__}.{type(value).__name__}"
                raise ValueError(
                    f"expected plain tensors to save, got {name} of {place} as a {kind}: save a quantised "
                    "model as it was before, and quantise it again when it is loaded; a sharded one once it "
                    "is whole; or keep what it is by torch.save(model.state_dict(), path)"
                )

    def _fetched(self, name: str) -> Tensor:
        """The tensor from the innermost module whose hook has it."""
        path = name.split(".")
        for depth in reversed(range(len(path))):
            part = self._module.get_submodule(".".join(path[:depth]))
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device  # it is there, since its hooks are

                with align_module_device(part, "cpu"):
                    tensor = part.state_dict()[".".join(path[depth:])]
                if not tensor.is_meta:
                    return tensor
        raise ValueError(f"expected a module with numbers, got {name} on the meta device, without any")


def digest_of(facts: object, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Digests facts, as JSON takes them, and every number of some state dicts.

    Args:
        facts: what the digest depends on besides the tensors.
        tensors: state dicts by what stands before their names; a tensor is read when it is its turn.
    """
    digest = hashlib.sha256(json.dumps(facts).encode())
    names = [(f"{prefix}{name}", state, name) for prefix, state in tensors.items() for name in state]
    for whole, state, name in sorted(names, key=lambda item: item[0]):
        for part, tensor in plain_parts(whole, state[name]):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()[:32]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, for digests."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
