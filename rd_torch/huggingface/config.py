"""What transformers wants to know of a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import torch
from transformers import PretrainedConfig

from rd_torch.backbone import ESM2, MissingHead
from rd_torch.config import RDConfig
from rd_torch.model import RDModel
from rd_torch.stage import map_shapes, stages_of

HEADS: Final = ("lm_head", "contact_head")


class RDTransformersConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """What transformers wants to know of a chain, and the chain's own config.

    Args:
        chain: the chain's `RDConfig`, as it is written into checkpoints.
        missing_heads: heads that backbones do not have, as `650M.contact_head`.
        hidden_dropout_prob: share of the features that training blanks in a task's head.
        initializer_range: standard deviation of the weights that a task's head begins with.
        **others: what every config of transformers takes, such as `num_labels` and `id2label`.
    """

    model_type = "rd_torch"

    def __init__(
        self,
        chain: Mapping[str, Any] | None = None,
        missing_heads: Sequence[str] = (),
        hidden_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        **others: Any,
    ) -> None:
        self.chain = None if chain is None else dict(chain)
        self.missing_heads = list(missing_heads)
        self.hidden_dropout_prob = hidden_dropout_prob
        self.initializer_range = initializer_range
        self.vocab_size = RDModel.alphabet_size
        self.mask_token_id = RDModel.mask_idx
        if chain is not None:
            config = RDConfig.from_dict(dict(chain))
            largest = config.levels[-1]
            self.hidden_size = config.widths[largest.name]
            self.num_hidden_layers = largest.num_layers
            self.num_attention_heads = largest.attention_heads
            self.intermediate_size = 4 * largest.width
        super().__init__(**{"pad_token_id": RDModel.padding_idx, **others})

    @classmethod
    def of(cls, model: RDModel, **options: Any) -> Self:
        """The config of a chain."""
        missing = [
            f"{level}.{head}"
            for level, backbone in model.backbones.items()
            for head in HEADS
            if isinstance(getattr(backbone, head), MissingHead)
        ]
        return cls(chain=model.config.to_dict(), missing_heads=missing, **options)

    def empty_chain(self) -> RDModel:
        """A chain of this config, whose numbers are still to be loaded."""
        config = RDConfig.from_dict(self.chain or {})
        backbones = {}
        for level in config.levels:
            backbone = ESM2(level.num_layers, level.width, level.attention_heads)
            backbone.reference = level.reference
            for head in HEADS:
                if f"{level.name}.{head}" in self.missing_heads:
                    setattr(backbone, head, MissingHead())
            backbones[level.name] = backbone
        exact = torch.float32  # whatever dtype others make a default of
        maps = {
            level: {part: torch.zeros(shape, dtype=exact) for part, shape in shapes.items()}
            for level, shapes in map_shapes(config).items()
        }
        return RDModel.of(config, backbones, list(stages_of(config, maps).values()))
