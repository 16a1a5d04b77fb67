"""Where a module's tensors are. Others may keep them elsewhere, on a disk say, and fetch them for each call.

accelerate's `cpu_offload`, `disk_offload` and `dispatch_model` do so by hooks: between calls a parameter is
on the meta device, of the right shape and dtype and without numbers. So nothing in this package reads a
weight but the module that owns it, in its own `forward`; what has to know more asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn


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
        return tensor if not tensor.is_meta else self._fetched(name)

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
