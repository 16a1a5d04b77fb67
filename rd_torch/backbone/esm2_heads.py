"""The two heads that ESM-2 comes with: letters of a residue, contacts of two.

Parameter names are fair-esm's, and so is every operation in its order, so that results are equal to the bit
(contacts: Rao et al., ICLR 2021, doi:10.1101/2020.12.15.422761).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LMHead(nn.Module):
    """Logits of every token at every position: `LayerNorm(gelu(x A' + a)) weight' + bias`.

    Args:
        embed_dim: features of a hidden state.
        output_dim: tokens of the alphabet.
        weight: `(output_dim, embed_dim)` table of embeddings, which is shared, not copied; or the module that
            embeds, as a backbone gives it to its head.

    With a module the weight is no parameter of the head, so that every tensor has one name in whatever
    a module around the backbone is saved, sharded or offloaded. The table is then read by calling the
    module: what others hang on its call, such as hooks that fetch its weight, acts on both of its uses.
    """

    def __init__(self, embed_dim: int, output_dim: int, weight: nn.Parameter | nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self._embedding: tuple[nn.Module, ...] = ()
        if isinstance(weight, nn.Module):
            self.tie(weight)
        else:
            self.weight = weight
        self.bias = nn.Parameter(torch.zeros(output_dim))

    def tie(self, embedding: nn.Module) -> None:
        """Reads the table from this module from now on."""
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule of the head

    def __getattr__(self, name: str) -> Any:
        """`weight` is the embedding's where there is one."""
        if name == "weight" and vars(self).get("_embedding"):
            return self._embedding[0].weight
        return super().__getattr__(name)

    def table(self) -> Tensor:
        """The `(output_dim, embed_dim)` weight, computed where it is not a parameter."""
        if not self._embedding:
            return self.weight
        return self._embedding[0](torch.arange(len(self.bias), device=self.bias.device))

    def forward(self, features: Tensor) -> Tensor:
        """`(..., embed_dim)` hidden states to `(..., output_dim)` logits, in the dtype of the weights."""
        x = self.dense(features.to(self.bias.dtype))
        # Written out: the library's own gelu, and a bias within the product, round differently.
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return functional.linear(self.layer_norm(x), self.table()) + self.bias


class ContactHead(nn.Module):
    """Probabilities that two residues touch, by logistic regression on all attention maps of a model.

    Each map is made symmetric, and what its row and column have on average is taken away.

    Args:
        in_features: attention maps of a model, its layers times its heads.
        prepend_bos: whether sequences begin with `<cls>`.
        append_eos: whether they end with `<eos>`.
        bias: whether the regression has an intercept.
        eos_idx: id of `<eos>`; needed where sequences end with one.

    Raises:
        ValueError: for sequences that end with `<eos>` without its id.
    """

    def __init__(
        self,
        in_features: int,
        prepend_bos: bool,
        append_eos: bool,
        bias: bool = True,
        eos_idx: int | None = None,
    ) -> None:
        super().__init__()
        if append_eos and eos_idx is None:
            raise ValueError("expected eos_idx, the id of <eos>, with append_eos, got none")
        self.in_features = in_features
        self.prepend_bos = prepend_bos
        self.append_eos = append_eos
        self.eos_idx = eos_idx
        self.regression = nn.Linear(in_features, 1, bias)
        self.activation = nn.Sigmoid()

    def forward(self, tokens: Tensor, attentions: Tensor) -> Tensor:
        """Contacts of a batch.

        Args:
            tokens: `(batch, time)` ids, from which the places of `<eos>` are read.
            attentions: `(batch, layers, heads, time, time)` maps in the dtype of the weights.

        Returns:
            `(batch, residues, residues)` probabilities, where `residues` is `time` without the columns of
            `<cls>` and `<eos>`. A sequence that is shorter than the longest has no meaning behind its end.
        """
        if self.append_eos and self.eos_idx is not None:
            other = tokens.ne(self.eos_idx).to(attentions)
            both = other[:, :, None] * other[:, None, :]
            attentions = (attentions * both[:, None, None])[..., :-1, :-1]
        if self.prepend_bos:
            attentions = attentions[..., 1:, 1:]
        maps = attentions.flatten(1, 2)
        features = _without_averages(maps + maps.mT).permute(0, 2, 3, 1)
        return self.activation(self.regression(features).squeeze(3))


def _without_averages(maps: Tensor) -> Tensor:
    """`x_ij - x_i. x_.j / x_..`, where a point stands for a sum: the average product correction."""
    expected = maps.sum(-1, keepdim=True) * maps.sum(-2, keepdim=True)
    expected.div_(maps.sum((-1, -2), keepdim=True))  # in place: as large as all attention maps
    return maps - expected
