"""`ChainModel`: the base class by which a chain takes the place of a model of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from rd_torch.backbone import Encoder, RotaryEmbedding
from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.huggingface.loading import load_chain, place_on_devices, was_saved_by_transformers
from rd_torch.huggingface.names import NamedTwice
from rd_torch.model import RDModel


class HeadLinear(nn.Linear):
    """A linear layer of a task's head; no checkpoint of ESM-2 has it, so that its weights begin at random."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in features)` to `(..., out features)` in the weights' dtype."""
        return super().forward(x.to(self.weight.dtype))


class ChainModel(NamedTwice, PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """The base class by which a chain takes the place of a model of transformers'."""

    config_class = RDTransformersConfig
    base_model_prefix = "esm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer", "ESMCLayer"]  # noqa: RUF012  # transformers' own way to say it

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *others: Any, level: str | None = None, **options: Any
    ) -> Any:
        """Load a chain and put the model around it, in `eval` mode.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` or transformers' Trainer wrote; or
                what `RDModel.from_pretrained` takes: `"esm2-rd-mini"`, a folder, a Hub id, the authors' maps.
            *others: further arguments of transformers' own method, for a folder that transformers wrote.
            level: the level to end at.
            **options: `dtype`, `device_map`, `max_memory` and `offload_folder`; options of
                `RDModel.from_pretrained`; `num_labels`, `id2label`, `problem_type` and other options of the
                config.

        Returns:
            The model.

        Raises:
            FileNotFoundError: where there is no chain.
            ValueError: for an option that nothing here takes, or a value that is not possible.
        """
        name = pretrained_model_name_or_path
        if was_saved_by_transformers(name):
            if level is not None:
                raise ValueError(f"expected no level beside a saved model, which is whole, got {level!r}")
            return super().from_pretrained(str(name), *others, **options)
        places = {key: options.pop(key, None) for key in ("device_map", "max_memory", "offload_folder")}
        chain, rest = load_chain(name, level, options)
        return place_on_devices(cls(chain, **rest).eval(), **places)

    def post_init(self) -> None:
        """Finish a new model, and have transformers load in float32 what no half type may touch."""
        super().post_init()
        self._keep_in_fp32_modules = {"stages", "rot_emb", "rotary_emb", "classifier"}
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules)

    @property
    def chain(self) -> RDModel:
        """The chain that runs inside."""
        chain: RDModel = self.base_model.model
        return chain

    @property
    def _largest(self) -> Encoder:
        return cast(Encoder, self.chain.family()[self.chain.config.levels[-1].name])

    def get_input_embeddings(self) -> nn.Module:
        """Return the largest backbone's table of token embeddings."""
        return self._largest.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the largest backbone's table of token embeddings by a module."""
        self._largest.embed_tokens = value  # type: ignore[assignment]  # an adapter, say

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """Refuse to change the number of tokens, which is the same in every backbone.

        Args:
            new_num_tokens: None, or the number of tokens that there are.
            *_: further arguments of transformers' own method, which change nothing.
            **__: likewise.

        Returns:
            The largest backbone's table of token embeddings.

        Raises:
            ValueError: for another number.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"expected the {self.config.vocab_size} tokens that every backbone has, got {new_num_tokens}"
            )
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Enable gradient checkpointing as `RDModel.gradient_checkpointing_enable` does."""
        self.chain.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Enable gradient checkpointing, under the name that newer versions of transformers have."""
        self.chain.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing as `RDModel.gradient_checkpointing_disable` does."""
        self.chain.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.chain.is_gradient_checkpointing

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what files lack, a task's layers and angles; transformers empties both as it loads."""
        if isinstance(module, HeadLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        if isinstance(module, RotaryEmbedding):
            module.renew()
