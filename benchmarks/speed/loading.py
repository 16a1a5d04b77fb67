"""How fast and in how much memory does ESM-2 650M load: ours from both formats, fair-esm from its own?

    python -m benchmarks.speed.loading --output benchmarks/results/loading.json

The script writes random weights of 650M's shape to a scratch folder (5 GB), loads them alternately, each time
in a process of its own, and reports medians. The peak is of anonymous host memory above what the process held
after importing; pages of the mapped file do not count, for the system takes them back at will. Files are in
the page cache when they are read. A second figure includes a first forward pass, which is when a mapped
file's pages are used.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import rd_torch
from benchmarks.options import new_parser
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.meter import MEBI, status_bytes
from benchmarks.speed.processes import in_own_process

SHAPE = (33, 1280, 20)
CASES = (
    ("rd_torch", "safetensors", "float32"),
    ("rd_torch", "pt", "float32"),
    ("fair-esm", "pt", "float32"),
    ("rd_torch", "safetensors", "bfloat16"),
    ("rd_torch", "pt", "bfloat16"),
)


def write_files(folder: Path, shape: tuple[int, int, int]) -> dict[str, Path]:
    """Write random weights as transformers writes safetensors and as fair-esm's `.pt` are laid out.

    Args:
        folder: Where to write.
        shape: Numbers of layers, of features and of attention heads.

    Returns:
        The file of each form, `"safetensors"` and `"pt"`.
    """
    from esm.model.esm2 import ESM2 as FairESM2  # here, for every process that loads would import them too
    from transformers import EsmConfig, EsmForMaskedLM

    num_layers, width, heads = shape
    config = EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=width, num_hidden_layers=num_layers,
        num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-5, token_dropout=True,
        position_embedding_type="rotary", emb_layer_norm_before=False,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(folder)
    tensors = FairESM2(*shape).state_dict()
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("contact_head")}
    encoder = {
        f"encoder.{'' if name.startswith('lm_head') else 'sentence_encoder.'}{name}": tensor
        for name, tensor in tensors.items()
    }
    cfg = Namespace(
        encoder_layers=num_layers, encoder_embed_dim=width, encoder_attention_heads=heads, token_dropout=True
    )
    torch.save({"cfg": {"model": cfg}, "model": encoder}, folder / "esm2_random.pt")
    torch.save({"model": head}, folder / "esm2_random-contact-regression.pt")
    return {"safetensors": folder / "model.safetensors", "pt": folder / "esm2_random.pt"}


def loader(library: str, path: Path, dtype: str) -> Callable[[], nn.Module]:
    """Return a function that loads a file, with everything imported that it needs."""
    if library == "fair-esm":
        from esm.pretrained import load_model_and_alphabet_local as load_fair_esm

        def load() -> nn.Module:
            with torch.serialization.safe_globals([Namespace]):
                return load_fair_esm(str(path))[0].eval()

        return load
    read = rd_torch.RDModel.from_pretrained  # this imports what it names
    return lambda: read(path, dtype=getattr(torch, dtype))


class Watch:
    """The most anonymous memory that this process has held, in bytes."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self) -> None:
        """Look at what is held now."""
        self.peak = max(self.peak, status_bytes("RssAnon"))


@contextmanager
def watching() -> Iterator[Watch]:
    """Look at the memory every millisecond, in a thread, and once more at the end."""
    watch, done = Watch(), threading.Event()

    def look_again_and_again() -> None:
        while not done.is_set():
            watch.look()
            time.sleep(0.001)

    thread = threading.Thread(target=look_again_and_again)
    thread.start()
    try:
        yield watch
        watch.look()
    finally:
        done.set()
        thread.join()


def load_once(library: str, path: Path, dtype: str) -> dict[str, float]:
    """Load a file in this process.

    Returns:
        `"seconds"`, `"seconds_with_forward"`, and `"anonymous"`, the peak of anonymous memory in MiB.
    """
    load = loader(library, path, dtype)
    before = status_bytes("RssAnon")
    with watching() as watch:
        start = time.perf_counter()
        model = load()
        seconds = time.perf_counter() - start
    waited = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor([[0, 20, 15, 11, 5, 19, 12, 2]]))
    return {
        "seconds": seconds,
        "seconds_with_forward": seconds + time.perf_counter() - waited,
        "anonymous": (watch.peak - before) / MEBI,
    }


def measure(folder: Path, rounds: int, shape: tuple[int, int, int]) -> list[Row]:
    """Load in all ways alternately, each time in its own process, and return a row for each way.

    Args:
        folder: Where to write the weights.
        rounds: How often each way loads.
        shape: Numbers of layers, of features and of attention heads.
    """
    paths = write_files(folder, shape)
    runs: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for (library, form, dtype), results in runs.items():
            results.append(in_own_process(load_once, library, paths[form], dtype))
    size = {form: path.stat().st_size / MEBI for form, path in paths.items()}
    rows: list[Row] = []
    for (library, form, dtype), results in runs.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        target = size[form] * (0.5 if dtype == "bfloat16" else 1)
        rows.append(
            {
                "library": library,
                "file": form,
                "dtype": dtype,
                "load, s": round(median["seconds"], 2),
                "with a forward pass, s": round(median["seconds_with_forward"], 2),
                "peak anonymous, MiB": round(median["anonymous"]),
                "share of the tensors": round(median["anonymous"] / target, 3),
            }
        )
    theirs = next(row for row in rows if row["library"] == "fair-esm")
    for row in rows:
        for key in ("load, s", "with a forward pass, s"):
            row[f"fair-esm's time over ours, {key[:-3]}"] = round(theirs[key] / row[key], 1)
    return rows


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="Number of times that each way loads, by default %(default)s."
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=SHAPE,
        metavar=("LAYERS", "WIDTH", "HEADS"),
        help="Shape of the weights, by default that of 650M.",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.rounds, tuple(arguments.shape))
    write_result("Loading ESM-2 650M", rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
