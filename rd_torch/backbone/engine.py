"""Inference on a GPU for changing lengths: fused parts, fixed packed sizes, CUDA graphs, two streams.

What a layer does token by token is compiled once a width, for any number of tokens; attention stays one
call of `varlen_attn`. Batches so small that launching kernels would take as long as running them are padded
to one of a few packed shapes and replayed as CUDA graphs. Smaller backbones run on a stream of their own
beside the largest. The modules stay as they are; everything derived lives here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.backbone.attention import attend, attend_varlen
from rd_torch.backbone.esm2 import ESM2, token_dropout
from rd_torch.backbone.layer import Heads, TransformerLayer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import at_least_float32
from rd_torch.config import ALPHABET

GRAPH_TOKENS: Final = 16_384
"""Packed tokens up to which graphs pay: above, kernels run longer than it takes to launch them."""

LEAST_SIZE: Final = 256
STEPS_PER_DOUBLING: Final = 8
LEAST_SEQUENCES: Final = 16
LEAST_LONGEST: Final = 128

MOST_RECORDINGS: Final = 32
"""Graphs that are kept; beyond that the one that was used longest ago goes."""


class Shape(NamedTuple):
    """A fixed packed shape: what a graph is recorded for."""

    tokens: int
    sequences: int
    longest: int


def shape_for(packing: Packing) -> Shape:
    """The fixed shape that holds a batch: eight packed sizes a doubling, powers of two else.

    What fills the packed tokens counts as one more sequence.
    """
    tokens = packing.edges[-1]
    step = max(LEAST_SIZE, _power_of_two(tokens) // 2) // STEPS_PER_DOUBLING
    size = max(LEAST_SIZE, -(-tokens // step) * step)
    sequences = max(LEAST_SEQUENCES, _power_of_two(len(packing.edges)))
    return Shape(size, sequences, max(LEAST_LONGEST, _power_of_two(max(packing.longest, size - tokens))))


@cache
def _fused() -> tuple[Callable[..., Heads], Callable[..., tuple[Tensor]]]:
    """The token-wise parts of a layer, compiled: once a width, for whatever engine asks."""
    heads = torch.compile(TransformerLayer.heads, dynamic=True)
    return heads, torch.compile(TransformerLayer.finish, dynamic=True)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class Inputs:
    """What every backbone needs of a batch.

    Attributes:
        ids: `(tokens,)` token ids.
        scale: `(tokens,)` factors of token dropout.
        positions: `(tokens,)` columns.
        mix: attention over `q, k, v` of the batch.
    """

    ids: Tensor
    scale: Tensor
    positions: Tensor
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]


class Slot:
    """Tensors of a fixed shape that batches are copied into.

    Args:
        shape: the shape.
        inputs: the first batch, for dtypes and device.
    """

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        self._ids = inputs.ids.new_empty(shape.tokens)
        self._scale = inputs.scale.new_empty(shape.tokens)
        self._positions = inputs.positions.new_empty(shape.tokens)
        self._edges = inputs.ids.new_empty(shape.sequences + 1, dtype=torch.int32)
        mix = partial(attend_varlen, edges=self._edges, longest=shape.longest)
        self.inputs = Inputs(self._ids, self._scale, self._positions, mix)

    def fill(self, inputs: Inputs, edges: Tensor) -> None:
        """Copies a batch in; behind it stands one sequence of padding, then empty ones."""
        size = len(self._ids)
        for fixed, given, filling in (
            (self._ids, inputs.ids, ALPHABET.padding_idx),
            (self._scale, inputs.scale, 0),
            (self._positions, inputs.positions, 0),
            (self._edges, edges, size),
        ):
            fixed[: len(given)].copy_(given)
            fixed[len(given) :].fill_(filling)


class Recording(NamedTuple):
    """A CUDA graph and the tensors that it reads."""

    slot: Slot
    graph: torch.cuda.CUDAGraph


class Engine:
    """Runs a chain's backbones without gradients, faster than the modules do by themselves.

    Results are the modules' own up to the rounding of fused arithmetic, and the same bits for the same
    batch whichever levels run.

    Args:
        family: the backbones by level, smallest first, on one device.
    """

    def __init__(self, family: Mapping[str, ESM2]) -> None:
        self._family = dict(family)
        self._heads, self._finish = _fused()
        weight = next(iter(family.values())).embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._recordings: OrderedDict[tuple[Shape, int], Recording] = OrderedDict()
        if self._device.type == "cuda":
            self._side = torch.cuda.Stream(self._device)
        if self._records:
            self._pool = torch.cuda.graph_pool_handle()
            self._hidden = {
                level: torch.empty(GRAPH_TOKENS, backbone.embed_dim, device=self._device)
                for level, backbone in family.items()
            }

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, packing: Packing, levels: int) -> dict[str, Tensor]:
        """Packed raw embeddings of the first `levels` backbones, valid until the next call."""
        ids, scale = token_dropout(tokens, packing, at_least_float32(self._dtype))
        inputs = Inputs(ids, scale, packing.positions, partial(attend, packing=packing))
        if not self._records or not 0 < len(ids) <= GRAPH_TOKENS:
            return self._run(inputs, levels)
        shape = shape_for(packing)
        try:
            recording = self._recordings.pop((shape, levels), None) or self._record(
                shape, inputs, packing, levels
            )
        except torch.OutOfMemoryError:  # of graphs' own memory: without any the batch may fit
            self._recordings.clear()
            return self._run(inputs, levels)
        self._recordings[shape, levels] = recording
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        recording.slot.fill(inputs, packing.edge_tensor)
        recording.graph.replay()
        return {level: self._hidden[level][: len(ids)] for level in list(self._family)[:levels]}

    @property
    def _records(self) -> bool:
        """Whether small batches are replayed as graphs: where attention needs nothing from the host."""
        sizes = (each.embed_dim // each.attention_heads for each in self._family.values())
        return all(hardware.has_varlen(self._device, self._dtype, size) for size in sizes)

    def _record(self, shape: Shape, inputs: Inputs, packing: Packing, levels: int) -> Recording:
        """Records the shape as a graph, after a run that compiles what is not compiled yet."""
        slot = Slot(shape, inputs)
        slot.fill(inputs, packing.edge_tensor)
        warming, main = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        warming.wait_stream(main)
        with torch.cuda.stream(warming):
            self._run(slot.inputs, levels)
        main.wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for level, hidden in self._run(slot.inputs, levels).items():
                self._hidden[level][: shape.tokens].copy_(hidden)
        return Recording(slot, graph)

    def _run(self, inputs: Inputs, levels: int) -> dict[str, Tensor]:
        """The first backbones; on a GPU the smaller ones beside the largest.

        The side stream waits for the main one at every start, so memory that it lent to the main
        stream is not used again before its turn.
        """
        *smaller, largest = list(self._family)[:levels]
        if not smaller or self._device.type != "cuda":
            return {level: self._run_one(level, inputs) for level in (*smaller, largest)}
        main = torch.cuda.current_stream(self._device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            raw = {level: self._run_one(level, inputs) for level in smaller}
        raw[largest] = self._run_one(largest, inputs)
        main.wait_stream(self._side)
        return raw

    def _run_one(self, level: str, inputs: Inputs) -> Tensor:
        """One backbone's final hidden states."""
        backbone = self._family[level]
        x = backbone.embedded(inputs.ids, inputs.scale)
        rotation = backbone.rotation(inputs.positions)
        for layer in backbone.layers:
            q, k, v = self._heads(layer, x, *rotation)
            (x,) = self._finish(layer, x, inputs.mix(q, k, v))
        return backbone.emb_layer_norm_after(x)
