"""The two heads that ESM-2 comes with: one predicts letters of residues, the other contacts between residues.

Parameters have fair-esm's names, and operations are fair-esm's in the same order, so that results are equal
to the bit (contacts: Rao et al., ICLR 2021, doi:10.1101/2020.12.15.422761).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LMHead(nn.Module):
    """The language-model head: logits of all tokens are `LayerNorm(gelu(x A' + a)) weight' + bias`.

    Where the weight comes as a module, it is no parameter of the head, so that every tensor has a single name
    in whatever saves, shards or offloads the backbone. The table is then read by calling the module, so that
    what others attach to its call, such as hooks that fetch its weight, acts here too.

    Args:
        embed_dim: number of features of a hidden state.
        output_dim: number of tokens of the alphabet.
        weight: `(output_dim, embed_dim)` table of embeddings, which is shared, not copied; or the module that
            embeds, which a backbone gives to its head.
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
        """Take the table from another module from now on."""
        self._embedding = (embedding,)  # in a tuple, so that it does not become a submodule of the head

    def __getattr__(self, name: str) -> Any:
        """Return the embedding's weight as `weight`, where the head has an embedding."""
        if name == "weight" and vars(self).get("_embedding"):
            return self._embedding[0].weight
        return super().__getattr__(name)

    def table(self) -> Tensor:
        """Return the `(output_dim, embed_dim)` weight, by a call of the embedding where there is one."""
        if not self._embedding:
            return self.weight
        return self._embedding[0](torch.arange(len(self.bias), device=self.bias.device))

    def forward(self, features: Tensor) -> Tensor:
        """Return `(..., output_dim)` logits of `(..., embed_dim)` features, in the dtype of the weights."""
        x = self.dense(features.to(self.bias.dtype))
        # Written out, because PyTorch's gelu, and a bias within the product, round differently from fair-esm.
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return functional.linear(self.layer_norm(x), self.table()) + self.bias


class ContactHead(nn.Module):
    """The contact head: it predicts which residues touch by logistic regression on a model's attention maps.

    Each map is made symmetric first, and freed from the averages of its rows and columns.

    Args:
        in_features: number of attention maps of a model, its layers times its heads.
        prepend_bos: whether sequences begin with `<cls>`.
        append_eos: whether sequences end with `<eos>`.
        bias: whether the regression has an intercept.
        eos_idx: id of `<eos>`, which is needed where sequences end with `<eos>`.

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
        """Predict the contacts of a batch.

        Args:
            tokens: `(batch, time)` ids, which tell where `<eos>` stands.
            attentions: `(batch, layers, heads, time, time)` attention maps in the dtype of the weights.

        Returns:
            `(batch, residues, residues)` probabilities, where `residues` is `time` without the columns of
            `<cls>` and `<eos>`. Behind the end of a shorter sequence they mean nothing.
        """
        if self.append_eos and self.eos_idx is not None:
            other = tokens.ne(self.eos_idx).to(attentions)
            both = other[:, :, None] * other[:, None, :]
            attentions = (attentions * both[:, None, None])[..., :-1, :-1]
        if self.prepend_bos:
            attentions = attentions[..., 1:, 1:]
        maps = attentions.flatten(1, 2)
        features = _correct_averages(maps + maps.mT).permute(0, 2, 3, 1)
        return self.activation(self.regression(features).squeeze(3))


def _correct_averages(maps: Tensor) -> Tensor:
    """Return `x_ij - x_i. x_.j / x_..`, where a point stands for a sum: the average product correction."""
    expected = maps.sum(-1, keepdim=True) * maps.sum(-2, keepdim=True)
    expected.div_(maps.sum((-1, -2), keepdim=True))  # in place, for it is as large as all attention maps
    return maps - expected
