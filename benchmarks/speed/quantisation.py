"""What do int8 backbones cost and save on a CPU, beside half precision: error per added block, speed, memory?

    python -m benchmarks.speed.quantisation mini --output benchmarks/results/quantisation_mini.json
    python -m benchmarks.speed.quantisation 650M --output benchmarks/results/quantisation_650M-cpu.json

The families, the proteins and the units of the errors are those of `benchmarks.speed.half_precision`, and so
is the reference: the same weights in float32. Maps are float32 in every variant. The variants are

- `float16` and `bfloat16`, by `model.to(dtype)`;
- `int8, quantize_dynamic`: PyTorch's own, one scale a weight matrix and one for all activations of a call;
- `int8, torchao, weights alone`: `Int8WeightOnlyConfig`, one scale a row of a matrix, products in float32;
- `int8, torchao, dynamic`: `Int8DynamicActivationInt8WeightConfig`, one scale a row and one a token;

each of them as the library gives it, uncompiled. Weights are the bytes of the state dict, the maps apart.
Speeds are medians over rounds in which all variants take turns on the same batches, the order reversed every
other round, each after an untimed pass over the smallest batch. "cosine, smallest" is over all blocks.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import rd_torch
from benchmarks.options import add_rounds_option
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.against_float32 import compare, embed, new_family_parser, prepare, three_digits
from benchmarks.speed.meter import MEBI
from rd_torch.modules import plain_parts

TIMED = 4
"""Number of batches that the clock runs over."""


def by_torchao(config: object) -> Callable[[rd_torch.RDModel], rd_torch.RDModel]:
    """Return a function that quantises a model by torchao."""

    def quantise(model: rd_torch.RDModel) -> rd_torch.RDModel:
        quantize_(model, config)
        return model

    return quantise


VARIANTS: dict[str, Callable[[rd_torch.RDModel], rd_torch.RDModel]] = {
    "float32": lambda model: model,
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "int8, quantize_dynamic": lambda model: quantize_dynamic(model, {nn.Linear}),
    "int8, torchao, weights alone": by_torchao(Int8WeightOnlyConfig()),
    "int8, torchao, dynamic": by_torchao(Int8DynamicActivationInt8WeightConfig()),
}


def bytes_of_weights(model: rd_torch.RDModel) -> int:
    """Return the bytes of the backbones."""
    parts = (part for value in model.backbones.state_dict().items() for _, part in plain_parts(*value))
    return sum(part.nbytes for part in parts)


def seconds_of(model: rd_torch.RDModel, batches: Sequence[Tensor]) -> float:
    """Return the seconds that all batches take, right after the smallest one ran untimed."""
    model.encode(min(batches, key=Tensor.numel))
    start = time.perf_counter()
    for tokens in batches:
        model.encode(tokens)
    return time.perf_counter() - start


def measure(model: rd_torch.RDModel, batches: Sequence[Tensor], rounds: int) -> list[Row]:
    """Return a row for each variant; the clock runs over the first batches alone."""
    models = {name: change(copy.deepcopy(model)) for name, change in VARIANTS.items()}
    exact = embed(models["float32"], batches)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in VARIANTS if number % 2 == 0 else reversed(list(VARIANTS)):
            seconds[name].append(seconds_of(models[name], batches[:TIMED]))
    tokens = sum(int((each != 1).sum()) for each in batches[:TIMED])
    fastest = {name: statistics.median(each) for name, each in seconds.items()}
    rows = []
    for name, variant in models.items():
        blocks = compare(model.config.widths, name, exact, embed(variant, batches))
        row: Row = {
            "backbones": name,
            "weights, MiB": three_digits(bytes_of_weights(variant) / MEBI),
            "tokens/s": three_digits(tokens / fastest[name]),
            "speed over float32's": round(fastest["float32"] / fastest[name], 3),
        }
        row |= {f"{block['level']}, mean error": block["error, mean"] for block in blocks}
        row["cosine, smallest"] = min(block["cosine, smallest"] for block in blocks)
        rows.append(row)
    return rows


@torch.no_grad()
def main() -> None:
    """Run the command line."""
    parser = new_family_parser(__doc__)
    add_rounds_option(parser, 3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of what PyTorch means to deprecate
    model, batches, facts = prepare(arguments)
    rows = measure(model, batches, arguments.rounds)
    title = f"int8 beside half precision on a CPU, per added block: {arguments.family}"
    machine = {**environment(), "torchao": version("torchao"), **facts}
    write_result(title, rows, machine, arguments.output)


if __name__ == "__main__":
    main()
