"""What training asks of a chain: freezing by level and by layer, gradient checkpointing, modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

from torch import nn

from rd_torch.backbone import ESM2
from rd_torch.config import RDConfig


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts every module inside the given ones into `eval` mode, and back into its own at the end.

    Backbones have no dropout of their own, but what others put into them, such as LoRA, may.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Trainable(nn.Module):
    """What a model of backbones needs in order to be trained."""

    config: RDConfig
    backbones: nn.ModuleDict

    def freeze_backbones(self, *levels: str, except_top: int = 0) -> Self:
        """Stops backbones from training; the maps are frozen already. Returns the model itself.

        Frozen layers run as in inference and keep no activations, unless something below them trains.

        Args:
            *levels: which, by name; by default all.
            except_top: top layers of each that stay as they are, and the last LayerNorm with them.

        Raises:
            ValueError: for a level that is not there, or more top layers than it has.
        """
        for name in levels or self.backbones:
            self.config.require_level(name)
            backbone = cast(ESM2, self.backbones[name])
            if not 0 <= except_top <= backbone.num_layers:
                raise ValueError(
                    f"expected except_top from 0 to {backbone.num_layers}, the layers of level {name}, "
                    f"got {except_top}: name the levels that have more"
                )
            layers = list(backbone.layers)
            kept = [*layers[len(layers) - except_top :], backbone.emb_layer_norm_after] if except_top else []
            left = {id(parameter) for module in kept for parameter in module.parameters()}
            for parameter in backbone.parameters():
                if id(parameter) not in left:
                    parameter.requires_grad_(False)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keeps only what goes from layer to layer; the backward pass computes the rest again.

        Args:
            gradient_checkpointing_kwargs: nothing, or `{"use_reentrant": False}`: the one way there is
                here, because the other loses gradients where the first input has none.

        Raises:
            ValueError: for other options.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options not in ({}, {"use_reentrant": False}):
            raise ValueError(f"expected no options but {{'use_reentrant': False}}, got {options}")
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any backbone computes its layers again in the backward pass."""
        return any(cast(ESM2, backbone).checkpointing for backbone in self.backbones.values())

    def _set_checkpointing(self, on: bool) -> None:
        for backbone in self.backbones.values():
            cast(ESM2, backbone).checkpointing = on
