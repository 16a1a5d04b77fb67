"""Trains the backbones of esm2-rd-mini, or ESM-C-shaped ones, as masked language models, resumable any time.

    python checkpoints/esm2-rd-mini/train.py --data DATA --state STATE --level 28K

trains one level on `DATA/natural50_train.fasta.xz` and leaves `STATE/28K.pt`; run again, it goes on where it
stopped. `make.py` beside it measures the losses, fits the maps and writes the checkpoint.

Every step draws its windows and masks from a generator seeded with the step, so that a resumed run sees what
an uninterrupted one would have seen. Matrix products run in bfloat16, the rest in float32.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from recipe import (
    CHAINS,
    SCHEDULES,
    SEED,
    Schedule,
    mask_residues,
    masked_loss,
    new_parser,
    read_sequences,
)
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.backbone import FAMILIES, Encoder, tokenize
from rd_torch.disk import write_whole
from rd_torch.levels import ALPHABET, Level

TOKENS_PER_STEP = 8_192
SHORT_WINDOWS = {128: 0.80, 256: 0.17, 1024: 0.03}  # tokens: share of the steps
LONG_WINDOWS = {512: 0.50, 1024: 0.50}
MUON_RATE, ADAM_RATE = 0.02, 4e-3  # peaks at width 32, see `peak_rates`
WARMUP = 0.02
SECONDS_BETWEEN_STATES = 120
STEPS_BETWEEN_LINES = 100


def read_tokens(path: Path, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequences of a FASTA file as one array of ids with special tokens, and their ends.

    Args:
        path: The file.
        most: Number of sequences to take, the first of the file; None for all.
    """
    sequences = read_sequences(path)[:most]
    rows = [tokenize([sequence], ALPHABET)[0].numpy().astype(np.uint8) for sequence in sequences]
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])


def draw_windows(
    stream: np.ndarray, ends: np.ndarray, rng: np.random.Generator, windows: Mapping[int, float]
) -> Tensor:
    """Draw a `(rows, time)` batch of windows of one random size; each token of the stream is as likely.

    The last window is cut so that every step has as many tokens: kernels are built once, not every time.

    Args:
        stream: All sequences, one after the other.
        ends: Where each of them ends.
        rng: Source of the choices.
        windows: By size in tokens, the share of the steps that have windows of that size.
    """
    size = int(rng.choice(list(windows), p=list(windows.values())))
    rows, missing = [], TOKENS_PER_STEP
    while missing:
        centre = int(rng.integers(len(stream)))
        record = int(np.searchsorted(ends, centre, side="right"))
        begin, end = (0 if record == 0 else int(ends[record - 1])), int(ends[record])
        start = min(max(centre - int(rng.integers(size)), begin), max(end - size, begin))
        window = stream[start : min(start + size, end)][:missing]
        rows.append(torch.from_numpy(window.astype(np.int64)))
        missing -= len(window)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ALPHABET.padding_idx)


class HalfLinear(nn.Linear):
    """A float32 linear layer whose product runs in bfloat16: three times as fast where the CPU has it."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in bfloat16."""
        bias = None if self.bias is None else self.bias.bfloat16()
        return functional.linear(x.bfloat16(), self.weight.bfloat16(), bias)


class HalfProjection(HalfLinear):
    """Such a layer whose result is float32, for attention, whose backward pass is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in bfloat16, and return float32."""
        return super().forward(x).float()


def new_model(level: Level) -> Encoder:
    """Return a model with fresh weights; the deeper it is, the smaller residual branches start."""
    torch.manual_seed(SEED)
    model = FAMILIES[level.family].of_level(level)
    assert isinstance(model, Encoder)
    nn.init.normal_(model.embed_tokens.weight, std=0.1)
    for module in model.modules():
        if type(module) is nn.Linear:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.embed_tokens.weight[ALPHABET.padding_idx].zero_()
        for layer in model.layers:
            share = getattr(layer, "share", 1)  # by which ESM-C multiplies a branch
            for name, linear in linear_layers(layer):
                if name in ("out_proj", "fc2", "o_proj", "down_proj"):
                    linear.weight.mul_((2 * model.num_layers) ** -0.5 / share)
    for layer in model.layers:
        for name, linear in linear_layers(layer):
            linear.__class__ = HalfProjection if name in ("q_proj", "k_proj", "v_proj") else HalfLinear
    return model


def linear_layers(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of a layer, with the last parts of their names."""
    return [
        (name.rpartition(".")[2], part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)
    ]


def peak_rates(width: int, haste: float) -> tuple[float, float]:
    """Return the peak learning rates of Muon and AdamW: wider models take smaller steps."""
    return haste * MUON_RATE * 32 / width, haste * ADAM_RATE * (32 / width) ** 0.5


def new_optimizers(model: Encoder) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, and AdamW for everything else."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for name, p in model.named_parameters() if id(p) not in taken and "contact_head" not in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(progress: float) -> float:
    """Return the learning rate as a share of its peak: a short rise, then a straight line to zero."""
    return min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


@dataclass
class Training:
    """A model in training, and all that its file holds.

    Attributes:
        model: The model.
        optimizers: What takes its steps.
        step: Number of steps that were taken.
        seen: Number of tokens that were seen.
        seconds: Time that was spent before this run.
        curve: By number of tokens, the mean loss over the steps since the entry before.
    """

    model: Encoder
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def begin(cls, level: Level) -> Training:
        """Return a training of fresh weights."""
        model = new_model(level)
        return cls(model, new_optimizers(model))

    def load(self, path: Path) -> None:
        """Go on from where a file left off."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen = state["step"], state["seen"]
        self.seconds, self.curve = state["seconds"], state["curve"]

    def save(self, path: Path, seconds: float) -> None:
        """Write everything; a kill leaves the old file or the new one.

        Args:
            path: The file.
            seconds: Time that was spent, this run included.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
            "seconds": seconds,
            "curve": self.curve,
        }
        write_whole(path, partial(torch.save, state), durable=False)

    def take_step(self, tokens: Tensor, rates: Mapping[torch.optim.Optimizer, float]) -> tuple[float, int]:
        """Train on a batch with these learning rates; return the summed loss and its number of residues."""
        for optimizer, rate in rates.items():
            optimizer.param_groups[0]["lr"] = rate
        masked = mask_residues(tokens, torch.Generator().manual_seed(self.step))
        loss, chosen = masked_loss(self.model, tokens, *masked)
        (loss / chosen).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + TOKENS_PER_STEP
        return float(loss.detach()), chosen


def train(level: Level, schedule: Schedule, data: Path, state_path: Path) -> None:
    """Train one level until its budget is spent, and write its state every two minutes and at the end.

    Args:
        level: Shape of the backbone.
        schedule: How to train it.
        data: Folder of the protein data.
        state_path: File of the state; one that is there is taken up.
    """
    stream, ends = read_tokens(data / "natural50_train.fasta.xz", schedule.proteins)
    training = Training.begin(level)
    if state_path.exists():
        training.load(state_path)
    peaks = dict(zip(training.optimizers, peak_rates(level.width, schedule.haste), strict=True))
    begun, written, total, count = time.monotonic(), time.monotonic(), 0.0, 0
    while training.seen < schedule.tokens:
        share_seen = training.seen / schedule.tokens
        windows = LONG_WINDOWS if share_seen >= schedule.long_from else SHORT_WINDOWS
        tokens = draw_windows(stream, ends, np.random.default_rng((SEED, training.step)), windows)
        share = rate_at(share_seen)
        loss, chosen = training.take_step(tokens, {each: peak * share for each, peak in peaks.items()})
        total, count = total + loss, count + chosen
        seconds = training.seconds + time.monotonic() - begun
        if training.step % STEPS_BETWEEN_LINES == 0:
            training.curve.append((training.seen, total / count))
            print(
                f"Level {level.name} has seen {training.seen:,} tokens in {training.step} steps and "
                f"{seconds:.0f} s; its loss is {total / count:.4f}.",
                flush=True,
            )
            total, count = 0.0, 0
        if time.monotonic() - written > SECONDS_BETWEEN_STATES or training.seen >= schedule.tokens:
            written = time.monotonic()
            training.save(state_path, seconds)


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    levels = {name: level for chain in CHAINS.values() for name, level in chain.items()}
    parser.add_argument("--level", choices=levels, required=True, help="Level to train.")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="Number of threads, by default as many as PyTorch takes.",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.state.mkdir(parents=True, exist_ok=True)
    name = arguments.level
    train(levels[name], SCHEDULES[name], arguments.data, arguments.state / f"{name}.pt")


if __name__ == "__main__":
    main()
