"""Functions for any PyTorch module: where its tensors are, what they hold, its mode, typed containers.

Other libraries may keep tensors elsewhere, on a disk for example, and fetch them for each call. accelerate's
`cpu_offload`, `disk_offload` and `dispatch_model` do so by hooks: between calls a parameter is on the meta
device, with the right shape and dtype but without numbers. Therefore only the module that owns a weight reads
it, in its own `forward`, and all other code that needs to know about weights calls functions of this file.
Quantisers put values into state dicts that are no plain tensors; `plain_parts` takes those apart.
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
Part_co = TypeVar("Part_co", bound=nn.Module, covariant=True)

if TYPE_CHECKING:

    class Modules(nn.ModuleDict, Generic[Part]):
        """An `nn.ModuleDict` whose modules are of one known type."""

        def __getitem__(self, key: str) -> Part: ...
        def values(self) -> ValuesView[Part]:
            """Return the modules."""

        def items(self) -> ItemsView[str, Part]:
            """Return names and modules."""

    class ModuleRow(nn.ModuleList, Generic[Part_co]):
        """An `nn.ModuleList` whose modules are of one known type."""

        def __getitem__(self, index: int) -> Part_co: ...  # type: ignore[override]  # slices are not used
        def __iter__(self) -> Iterator[Part_co]: ...
else:  # not subclasses: other libraries look for PyTorch's own classes
    Modules, ModuleRow = nn.ModuleDict, nn.ModuleList


def as_module_name(name: str) -> str:
    """Return a name by which a module can be called, which is the given one wherever that is possible."""
    name = name.replace(".", "_")
    return f"{name}_" if hasattr(nn.ModuleDict(), name) else name


def require_module_names(names: Iterable[str]) -> None:
    """Require that modules can be called by the names.

    Raises:
        ValueError: for a name that modules have for something else, such as `"half"`.
    """
    taken = [name for name in names if as_module_name(name) != name]
    if taken:
        raise ValueError(
            f"expected levels by names that PyTorch's modules have for nothing else, got {', '.join(taken)}: "
            "choose others"
        )


def modules_of(parts: Mapping[str, Part]) -> Modules[Part]:
    """Return an `nn.ModuleDict` of the modules, whose type a type checker knows.

    Raises:
        ValueError: for names that `require_module_names` refuses.
    """
    require_module_names(parts)
    return cast("Modules[Part]", nn.ModuleDict(parts))


def row_of(parts: Iterable[Part]) -> ModuleRow[Part]:
    """Return an `nn.ModuleList` of the modules, whose type a type checker knows."""
    return cast("ModuleRow[Part]", nn.ModuleList(parts))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules and every module inside them into `eval` mode, and back into their own modes at the end.

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
    """Return the device that a module takes its inputs on.

    It is the device of the first tensor that is not on the meta device. Where hooks keep all tensors
    elsewhere, it is the device that the hooks fetch them to.
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
    """Return whether the module has hooks that may fetch its tensors when it is called."""
    return any(part._forward_pre_hooks or hasattr(part, "_hf_hook") for part in module.modules())


def is_plain(value: Any) -> bool:
    """Return whether a value of a state dict is a plain tensor, neither quantised nor sharded."""
    return isinstance(value, Tensor) and not value.is_quantized and not hasattr(value, "__tensor_flatten__")


def plain_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Take a value of a state dict apart into plain tensors.

    A plain tensor is its own only part. torchao's tensors have several parts, and so have PyTorch's quantised
    tensors and what its quantised layers pack. What is no tensor, such as a dtype or torchao's note of how
    inputs are quantised, becomes the bytes of its text.

    Args:
        name: name of the value, with which the names of its parts begin.
        value: the value.

    Yields:
        The name of each part, and the part.
    """
    if hasattr(value, "full_tensor"):  # a shard of FSDP2, for which every process has to make this call
        value = value.full_tensor()
    if isinstance(value, tuple | list):
        for place, each in enumerate(value):
            yield from plain_parts(f"{name}.{place}", each)
    elif not isinstance(value, Tensor):
        text = re.sub(r" at 0x[0-9a-f]+", "", str(value))  # addresses in memory differ from run to run
        yield name, torch.tensor(list(text.encode()), dtype=torch.uint8)
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
    """A module's state dict. A tensor that accelerate's hooks keep elsewhere is fetched when it is read.

    Thus the tensors of no more than one module need to be in memory at a time.

    Args:
        module: the module.
        keep: takes the name of a tensor and returns whether the state dict holds it; by default it holds all.
    """

    def __init__(self, module: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> None:
        self._module = module
        self._state = {name: tensor for name, tensor in module.state_dict().items() if keep(name)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor of this name, fetched if need be.

        Raises:
            KeyError: for a name that is not there.
            ValueError: for a tensor that has no numbers anywhere.
        """
        tensor = self._state[name]
        return self._fetch(name) if isinstance(tensor, Tensor) and tensor.is_meta else tensor

    def require_plain(self, place: str) -> None:
        """Refuse to save values that are no plain tensors, because files of weights hold nothing else.

        Args:
            place: name of the module in the message, such as a level.

        Raises:
            ValueError: for the first value that is no plain tensor.
        """
        for name, value in self._state.items():
            if not is_plain(value):
                kind = f"{type(value).__module__}.{type(value).__name__}"
                raise ValueError(
                    f"expected plain tensors to save, got {name} of {place} as a {kind}: save the model "
                    "before you quantise it, and quantise it again after loading; save a sharded model once "
                    "it is whole; or keep the model as it is with torch.save(model.state_dict(), path)"
                )

    def _fetch(self, name: str) -> Tensor:
        """Return the tensor from the innermost module whose hook has it."""
        path = name.split(".")
        for depth in reversed(range(len(path))):
            part = self._module.get_submodule(".".join(path[:depth]))
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device  # installed, because its hooks are here

                with align_module_device(part, "cpu"):
                    tensor = part.state_dict()[".".join(path[depth:])]
                if not tensor.is_meta:
                    return tensor
        raise ValueError(f"expected a module with numbers, got {name} on the meta device, without any")


def digest_of(facts: object, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Digest facts and every number of some state dicts.

    Args:
        facts: values, as JSON takes them, that the digest depends on besides the tensors.
        tensors: state dicts, by a prefix for the names in each; a tensor is read only when its turn comes.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(facts).encode())
    # Sorted, so that the order in which modules were registered does not count.
    names = [(f"{prefix}{name}", state, name) for prefix, state in tensors.items() for name in state]
    for whole, state, name in sorted(names, key=lambda item: item[0]):
        for part, tensor in plain_parts(whole, state[name]):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()[:32]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor as bytes, for digests."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
