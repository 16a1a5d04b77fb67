"""`RDTransformersConfig`: a chain's config in the form that transformers reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from rd_torch.backbone import MissingHead, class_of
from rd_torch.config import RDConfig
from rd_torch.levels import ALPHABET
from rd_torch.model import RDModel
from rd_torch.stage import map_shapes, stages_of


class RDTransformersConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """A chain's config in the form that transformers reads and writes, with the options of a task's head.

    Args:
        chain: the chain's `RDConfig`, as it is written into checkpoints.
        missing_heads: heads that backbones lack, such as `650M.contact_head`.
        hidden_dropout_prob: share of the features that a task's head sets to zero in training, 0 to 1.
        initializer_range: standard deviation of the weights that a task's head begins with.
        vocab_size: number of rows in the largest backbone's table of embeddings.
        mask_token_id: id of `<mask>`.
        intermediate_size: number of features inside the largest backbone's feed-forward blocks; by default
            four times its width, as in ESM-2.
        **others: options of every config of transformers, such as `num_labels` and `id2label`.
    """

    model_type = "rd_torch"

    def __init__(
        self,
        chain: Mapping[str, Any] | None = None,
        missing_heads: Sequence[str] = (),
        hidden_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        vocab_size: int = len(ALPHABET),
        mask_token_id: int = ALPHABET.mask_idx,
        intermediate_size: int | None = None,
        **others: Any,
    ) -> None:
        self.chain = None if chain is None else dict(chain)
        self.missing_heads = list(missing_heads)
        self.hidden_dropout_prob = hidden_dropout_prob
        self.initializer_range = initializer_range
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        if chain is not None:
            config = RDConfig.from_dict(dict(chain))
            largest = config.levels[-1]
            self.hidden_size = config.widths[largest.name]
            self.num_hidden_layers = largest.num_layers
            self.num_attention_heads = largest.attention_heads
            self.intermediate_size = intermediate_size or 4 * largest.width
        super().__init__(**{"pad_token_id": ALPHABET.padding_idx, **others})

    @classmethod
    def of(cls, model: RDModel, **options: Any) -> Self:
        """Make the config of a chain; `options` are those of the class."""
        missing = [
            f"{name}.{head}"
            for name, backbone in model.backbones.items()
            for head in backbone.heads
            if isinstance(getattr(backbone, head), MissingHead)
        ]
        *_, largest = model.backbones.values()
        facts: dict[str, Any] = {
            "vocab_size": getattr(largest, "vocab_size", model.alphabet_size),
            "mask_token_id": model.mask_idx,
            "pad_token_id": model.padding_idx,
            "intermediate_size": getattr(largest, "hidden_dim", None),
        }
        return cls(chain=model.config.to_dict(), missing_heads=missing, **facts | options)

    def empty_chain(self) -> RDModel:
        """Make the chain that this config describes, with weights and maps that are still to be loaded."""
        config = RDConfig.from_dict(self.chain or {})
        backbones = {}
        for name, level in {level.backbone: level for level in config.levels}.items():  # the deepest of each
            backbones[name] = backbone = class_of(level).of_level(level)
            backbone.reference = level.reference
            for head in backbone.heads:
                if f"{name}.{head}" in self.missing_heads:
                    setattr(backbone, head, MissingHead())
        exact = torch.float32  # transformers may have made another dtype the default
        maps = {
            level: {part: torch.zeros(shape, dtype=exact) for part, shape in shapes.items()}
            for level, shapes in map_shapes(config).items()
        }
        family = {level.name: backbones[level.backbone] for level in config.levels}
        return RDModel.of(config, family, list(stages_of(config, maps).values()))
