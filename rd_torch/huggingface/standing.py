"""What a chain needs in order to stand where a model of transformers' stood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rd_torch.backbone import ESM2
from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.huggingface.loading import chain_and_options, is_ours_by_transformers, placed
from rd_torch.huggingface.names import NamedTwice
from rd_torch.model import RDModel


class Fresh(nn.Linear):
    """A linear layer of a task's head, which no checkpoint of ESM-2 has."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in features)` to `(..., out features)` in the weights' dtype."""
        return super().forward(x.to(self.weight.dtype))


class Standing(NamedTwice, PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """What a chain needs in order to stand where a model of transformers' stood."""

    config_class = RDTransformersConfig
    base_model_prefix = "esm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012  # transformers' own way to say it

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *others: Any, level: str | None = None, **options: Any
    ) -> Any:
        """A model around a chain, in `eval` mode.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` or transformers' Trainer wrote; or
                what `RDModel.from_pretrained` takes: `"esm2-rd-mini"`, a folder, a Hub id, the authors' maps.
            *others: what transformers' own takes there.
            level: the level to end at.
            **options: `dtype`, `device_map`, `max_memory`, `offload_folder`; what `RDModel.from_pretrained`
                takes; `num_labels`, `id2label`, `problem_type` and whatever else is the config's.

        Raises:
            FileNotFoundError: where no chain is.
            ValueError: for an option that is nobody's, or a value that cannot be.
        """
        name = pretrained_model_name_or_path
        if is_ours_by_transformers(name):
            if level is not None:
                raise ValueError(f"expected no level beside a saved model, which is whole, got {level!r}")
            return super().from_pretrained(str(name), *others, **options)
        places = {key: options.pop(key, None) for key in ("device_map", "max_memory", "offload_folder")}
        chain, rest = chain_and_options(name, level, options)
        return placed(cls(chain, **rest).eval(), **places)

    def post_init(self) -> None:
        """What transformers does when a model is made; what no half type may touch is loaded in float32."""
        super().post_init()
        self._keep_in_fp32_modules = {"stages", "rot_emb", "classifier"}
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules)

    @property
    def chain(self) -> RDModel:
        """The chain inside."""
        chain: RDModel = self.base_model.model
        return chain

    @property
    def _largest(self) -> ESM2:
        return self.chain.backbones[self.chain.config.levels[-1].name]

    def get_input_embeddings(self) -> nn.Module:
        """The largest backbone's table."""
        return self._largest.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts a module in the place of the largest backbone's table."""
        self._largest.embed_tokens = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """Raises a ValueError for any other size than there is."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"expected the {self.config.vocab_size} tokens that every backbone has, got {new_num_tokens}"
            )
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """As the chain's own."""
        self.chain.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """The same under the name that newer versions of transformers have."""
        self.chain.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """As the chain's own."""
        self.chain.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.chain.is_gradient_checkpointing

    def _init_weights(self, module: nn.Module) -> None:
        """Begins what a task adds; transformers asks for all modules, but the others have their numbers."""
        if isinstance(module, Fresh):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
