"""Run a chain's backbones fast on a GPU, for batches of changing lengths.

What a layer does token by token is compiled once for each width, for any number of tokens; attention stays
one call of `varlen_attn`. Batches so small that launching kernels would take as long as running them are
filled up to one of a few packed shapes, and replayed as CUDA graphs. Smaller backbones run on a stream of
their own beside the largest. The modules stay as they are; whatever is derived from them lives here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.backbone.attention import attend, attend_varlen
from rd_torch.backbone.backbone import Taken
from rd_torch.backbone.encoder import Encoder
from rd_torch.backbone.layer import Heads, Layer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import at_least_float32
from rd_torch.backbone.running import runs_of

# The numbers below are choices, which no benchmark has tried yet. Others would change speed and memory alone.

GRAPH_TOKENS: Final = 16_384
"""Most packed tokens of a batch that is replayed as a graph.

Kernels of larger batches run longer than it takes to launch them, so that a graph would gain nothing. The
buffers that graphs write raw embeddings to have as many rows.
"""

LEAST_SIZE: Final = 256
"""Smallest packed size, which smaller batches share, because so few tokens hardly keep a GPU busy anyway."""

STEPS_PER_DOUBLING: Final = 8
"""Number of packed sizes between a power of two and the next.

With eight, what fills a batch above `LEAST_SIZE` is less than an eighth of it, and there are 49 sizes up to
`GRAPH_TOKENS`. More steps would fill less, but record more graphs, each of which takes time and memory.
"""

LEAST_SEQUENCES: Final = 16
"""Smallest number of sequences in a shape; others are powers of two, for an empty sequence costs little."""

LEAST_LONGEST: Final = 128
"""Smallest bound of the lengths in a shape; others are powers of two, for a loose bound costs little."""

MOST_RECORDINGS: Final = 32
"""Most graphs that are kept; the one that was used longest ago makes room for the next.

Graphs share their working memory, but each holds a slot and takes memory of the driver's.
"""


class Shape(NamedTuple):
    """A fixed packed shape, for which a graph is recorded.

    Attributes:
        tokens: number of packed tokens.
        sequences: number of sequences, some of which are empty.
        longest: bound of the sequences' lengths.
    """

    tokens: int
    sequences: int
    longest: int


def shape_for(packing: Packing) -> Shape:
    """Return the smallest fixed shape that holds a batch.

    The tokens that fill the shape up are one more sequence, so that no real token attends to them.
    """
    tokens = packing.edges[-1]
    step = max(LEAST_SIZE, _power_of_two(tokens) // 2) // STEPS_PER_DOUBLING
    size = max(LEAST_SIZE, -(-tokens // step) * step)
    sequences = max(LEAST_SEQUENCES, _power_of_two(len(packing.edges)))
    return Shape(size, sequences, max(LEAST_LONGEST, _power_of_two(max(packing.longest, size - tokens))))


@cache  # so that all engines share what is compiled
def _compile_parts(kind: type[Layer]) -> tuple[Callable[..., Heads], Callable[..., tuple[Tensor]]]:
    """Return the token-wise parts of a family's layer, which PyTorch compiles once for each width."""
    return torch.compile(kind.begin, dynamic=True), torch.compile(kind.finish, dynamic=True)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class Inputs:
    """The part of a batch that all backbones read.

    Attributes:
        ids: `(tokens,)` token ids.
        scale: `(tokens,)` factors of the tokens' embeddings.
        positions: `(tokens,)` columns of the tokens.
        mix: function of `q, k, v` that computes attention within the sequences of the batch.
    """

    ids: Tensor
    scale: Tensor
    positions: Tensor
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]


class Slot:
    """Tensors of a fixed shape, at addresses that stay, into which batches are copied for a graph to read.

    Args:
        shape: shape of the tensors.
        inputs: any batch; the tensors have its dtypes and device.
        padding: id of the token that fills a slot up.
    """

    def __init__(self, shape: Shape, inputs: Inputs, padding: int) -> None:
        self._padding = padding
        self._ids = inputs.ids.new_empty(shape.tokens)
        self._scale = inputs.scale.new_empty(shape.tokens)
        self._positions = inputs.positions.new_empty(shape.tokens)
        self._edges = inputs.ids.new_empty(shape.sequences + 1, dtype=torch.int32)
        mix = partial(attend_varlen, edges=self._edges, longest=shape.longest)
        self.inputs = Inputs(self._ids, self._scale, self._positions, mix)

    def fill(self, inputs: Inputs, edges: Tensor) -> None:
        """Copy a batch in; after it stand one sequence of padding and then empty sequences.

        Args:
            inputs: batch, of no more tokens than the slot has.
            edges: `(sequences + 1,)` edges of its sequences.
        """
        size = len(self._ids)
        for fixed, new, filling in (
            (self._ids, inputs.ids, self._padding),
            (self._scale, inputs.scale, 0),
            (self._positions, inputs.positions, 0),
            (self._edges, edges, size),
        ):
            fixed[: len(new)].copy_(new)
            fixed[len(new) :].fill_(filling)


class Recording(NamedTuple):
    """A CUDA graph, and the slot that it reads."""

    slot: Slot
    graph: torch.cuda.CUDAGraph


class Engine:
    """A function that runs a chain's backbones without gradients, faster than the modules run by themselves.

    Results are those of the modules up to the rounding of fused arithmetic. The same batch gives the same
    bits, whichever levels run.

    Args:
        family: backbones by level, smallest first, on one device and of one family of models.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.
    """

    def __init__(self, family: Mapping[str, Encoder], *, final_norm: bool = True) -> None:
        self._family, self._final_norm = dict(family), final_norm
        self._first = next(iter(family.values()))
        self._begin, self._finish = _compile_parts(type(self._first.layers[0]))  # type: ignore[arg-type]  # classes are hashable
        weight = self._first.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._recordings: OrderedDict[tuple[Shape, int], Recording] = OrderedDict()
        if self._device.type == "cuda":
            self._side = torch.cuda.Stream(self._device)
        if self._records:
            # All graphs share one memory pool, so that a replay overwrites what another graph left there.
            # Each graph therefore ends by copying its results into these buffers, which lie outside the pool.
            self._pool = torch.cuda.graph_pool_handle()
            self._hidden = {
                level: torch.empty(GRAPH_TOKENS, backbone.embed_dim, device=self._device)
                for level, backbone in family.items()
            }

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, packing: Packing, count: int) -> dict[str, Tensor]:
        """Run the backbones of the first levels of the family.

        Args:
            tokens: `(batch, time)` ids.
            packing: packing of the tokens that are no padding.
            count: number of levels.

        Returns:
            `(tokens, width)` packed raw embeddings by level, which the next call overwrites.
        """
        ids, scale = self._first.weigh(tokens, packing, at_least_float32(self._dtype))
        inputs = Inputs(ids, scale, packing.positions, partial(attend, packing=packing))
        if not self._records or not 0 < len(ids) <= GRAPH_TOKENS:
            return self._run(inputs, count)
        shape = shape_for(packing)
        try:
            recording = self._recordings.pop((shape, count), None) or self._record(
                shape, inputs, packing, count
            )
        except torch.OutOfMemoryError:  # graphs have memory of their own; without them the batch may fit
            self._recordings.clear()
            return self._run(inputs, count)
        self._recordings[shape, count] = recording  # at the end of the order, as the last one used
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        recording.slot.fill(inputs, packing.edge_tensor)
        recording.graph.replay()
        return {level: self._hidden[level][: len(ids)] for level in list(self._family)[:count]}

    @property
    def _records(self) -> bool:
        """Whether small batches are replayed as graphs: where attention needs nothing from the CPU."""
        sizes = (each.embed_dim // each.attention_heads for each in self._family.values())
        return all(hardware.has_varlen(self._device, self._dtype, size) for size in sizes)

    def _record(self, shape: Shape, inputs: Inputs, packing: Packing, count: int) -> Recording:
        """Return a new recording of the first levels for a shape.

        They run once before, to compile what is not compiled yet: a compiler must not run while a graph is
        recorded. PyTorch asks for a stream of its own for that run. It waits for the copies into the slot,
        and recording waits for it.
        """
        slot = Slot(shape, inputs, self._first.alphabet.padding_idx)
        slot.fill(inputs, packing.edge_tensor)
        warming, main = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        warming.wait_stream(main)
        with torch.cuda.stream(warming):
            self._run(slot.inputs, count)
        main.wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for level, hidden in self._run(slot.inputs, count).items():
                self._hidden[level][: shape.tokens].copy_(hidden)
        return Recording(slot, graph)

    def _run(self, inputs: Inputs, count: int) -> dict[str, Tensor]:
        """Return raw embeddings of the first levels; on a GPU smaller backbones run beside the largest.

        The side stream waits for the main stream before it starts. Without that, PyTorch's allocator could
        give the side stream the memory of its last results again while the main stream still reads them.
        """
        needed = dict(list(self._family.items())[:count])
        *smaller, largest = runs_of(needed, final_norm=self._final_norm)
        raw: dict[str, Tensor] = {}
        if not smaller or self._device.type != "cuda":
            for run in (*smaller, largest):
                raw |= self._run_one(*run, inputs)
        else:
            main = torch.cuda.current_stream(self._device)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                for run in smaller:
                    raw |= self._run_one(*run, inputs)
            raw |= self._run_one(*largest, inputs)
            main.wait_stream(self._side)
        return {level: raw[level] for level in needed}

    def _run_one(
        self, backbone: Encoder, taken: Taken, levels: Sequence[str], inputs: Inputs
    ) -> dict[str, Tensor]:
        """Return the hidden states that levels take from a backbone, by level."""
        rotation = backbone.rotation(inputs.positions)

        def run(layer: Layer, x: Tensor) -> Tensor:
            """Return the residual stream after a layer."""
            q, k, v = self._begin(layer, x, *rotation)
            return self._finish(layer, x, inputs.mix(q, k, v))[0]

        x = backbone.embedded(inputs.ids, inputs.scale)
        return dict(zip(levels, backbone.hidden_states(x, run, taken), strict=True))
