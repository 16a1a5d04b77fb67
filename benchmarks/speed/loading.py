"""How fast and in how much memory ESM-2 650M loads: ours from both formats, fair-esm from its own.

    python -m benchmarks.speed.loading --output benchmarks/results/loading.json

writes random weights of 650M's shape to a scratch folder (5 GB), loads them alternately, each time in a
process of its own, and reports medians. The peak is of anonymous host memory above what the process
held after importing; pages of the mapped file do not count, for the system takes them back at will.
Files are in the page cache when they are read. A second figure includes a first forward pass, which
is when a mapped file's pages are used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path

import torch

import rd_torch
from benchmarks.report import environment, write_result

SHAPE = (33, 1280, 20)
CASES = (
    ("rd_torch", "safetensors", "float32"),
    ("rd_torch", "pt", "float32"),
    ("fair-esm", "pt", "float32"),
    ("rd_torch", "safetensors", "bfloat16"),
    ("rd_torch", "pt", "bfloat16"),
)


def write_files(folder: Path, shape: tuple[int, int, int]) -> dict[str, Path]:
    """Random weights as transformers writes safetensors and as fair-esm's `.pt` are laid out."""
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


def anonymous_bytes() -> int:
    """Anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("expected RssAnon in /proc/self/status, got none: this needs Linux")


def load_once(library: str, path: Path, dtype: str) -> dict[str, float]:
    """Loads in this process; seconds, seconds with a forward pass, and the peak of anonymous memory."""
    if library == "fair-esm":
        from esm.pretrained import load_model_and_alphabet_local as load_fair_esm
    else:
        rd_torch.RDModel, rd_torch.ESM2  # imported now, not while the clock runs  # noqa: B018
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if library == "fair-esm":
        with torch.serialization.safe_globals([Namespace]):
            model = load_fair_esm(str(path))[0].eval()
    else:
        model = rd_torch.RDModel.from_pretrained(path, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    peak = max(peak, anonymous_bytes())
    done.set()
    watcher.join()
    with torch.no_grad():
        model(torch.tensor([[0, 20, 15, 11, 5, 19, 12, 2]]))
    return {
        "seconds": seconds,
        "seconds_with_forward": time.perf_counter() - start,
        "anonymous": (peak - before) / 2**20,
    }


def measure(folder: Path, rounds: int, shape: tuple[int, int, int]) -> list[dict[str, object]]:
    """All cases alternately, each load in its own process; one row a case."""
    paths = write_files(folder, shape)
    runs: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, results in runs.items():
            library, form, dtype = case
            command = [
                sys.executable,
                "-m",
                "benchmarks.speed.loading",
                "--once",
                library,
                str(paths[form]),
                dtype,
            ]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(printed))
    size = {form: path.stat().st_size / 2**20 for form, path in paths.items()}
    rows = []
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("LAYERS", "WIDTH", "HEADS"))
    parser.add_argument("--once", nargs=3, metavar=("LIBRARY", "FILE", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        library, path, dtype = arguments.once
        print(json.dumps(load_once(library, Path(path), dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.rounds, tuple(arguments.shape))
    write_result("Loading ESM-2 650M", rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
