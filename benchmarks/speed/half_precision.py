"""How far are half-precision backbones from float32, per block of features that a level adds?

    python -m benchmarks.speed.half_precision mini --output benchmarks/results/half_precision_mini.json
    python -m benchmarks.speed.half_precision 650M --output benchmarks/results/half_precision_650M.json
    python -m benchmarks.speed.half_precision esmc --output benchmarks/results/esmc/half_precision.json

A level's block is what it adds to the nested embedding. Each variant turns the backbones alone; weights and
float32 maps are those of the reference. In `float16` and `bfloat16` the residual stream has that type too,
rounded after every addition, and so has the embedding that leaves the backbone; in `..., float32 residual`
the stream stays in float32, as the library has it. Errors are over residues, in units of the block's standard
deviation in float32: the root of its features' mean variance over residues. The pooled error is the largest
error of a protein's mean, in the same units. Cosines are between a residue's two block vectors, both less the
mean in float32. Proteins are natural ones of the validation set, of at most 1,022 residues.

`mini` is the shipped, trained family. `650M` has the full shapes of ESM-2 8M to 650M, and `esmc` those of
ESM-C 300M and 600M above a backbone of 6B's 80 layers, 640 wide. Both have random weights whose numbers
behave like a trained model's, by the recipe in `benchmarks/speed/lifelike_weights.py`; their maps are fitted
by `rd_torch.fit` in float32, on proteins that are not compared. What the recipe reached, on proteins that are
compared, stands with the environment: the growth from the embedding to the last layer; the magnitude of the
four large channels at the end, median over tokens; the number of keys that a query attends to (the
exponential of the attention's entropy, mean over queries, heads and layers); and the share of the stream's
mean square that varies between tokens, the four channels apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import rd_torch
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.against_float32 import compare, embed, new_family_parser, prepare
from rd_torch.backbone import Layer

DTYPES = (torch.float16, torch.bfloat16)


class HalfResidual(Layer):
    """A layer whose residual stream has the weights' dtype: each addition is rounded to it."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Turn `(tokens, width)` into the same, in the weights' dtype."""
        return super().forward(x.to(next(self.parameters()).dtype), *rest)


def with_half_residual(kind: type[Layer]) -> type[Layer]:
    """Return a class of layers like another one, but for their residual stream."""
    return type(f"HalfResidual{kind.__name__}", (HalfResidual, kind), {})


@contextmanager
def half_residual(model: rd_torch.RDModel) -> Iterator[None]:
    """Turn all layers of the model into `HalfResidual`, and back."""
    layers = [part for part in model.modules() if isinstance(part, Layer)]
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = with_half_residual(kind)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def measure(model: rd_torch.RDModel, batches: Sequence[Tensor]) -> list[Row]:
    """Compare all variants with float32, and return their rows sorted by level."""
    exact, widths = embed(model, batches), model.config.widths
    rows = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        half = copy.deepcopy(model).to(dtype)
        with half_residual(half):
            rows += compare(widths, name, exact, embed(half, batches))
        rows += compare(widths, f"{name}, float32 residual", exact, embed(half, batches))
    return sorted(rows, key=lambda row: list(widths).index(row["level"]))


@torch.no_grad()
def main() -> None:
    """Run the command line."""
    arguments = new_family_parser(__doc__).parse_args()
    model, batches, facts = prepare(arguments)
    rows = measure(model, batches)
    title = f"Half precision against float32, per added block: {arguments.family}"
    write_result(title, rows, {**environment(), **facts}, arguments.output)


if __name__ == "__main__":
    main()
