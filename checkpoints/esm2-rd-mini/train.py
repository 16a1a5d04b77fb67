"""Trains the four backbones of esm2-rd-mini as masked language models, resumable at any moment.

    python checkpoints/esm2-rd-mini/train.py --data DATA --state STATE --level 28K

trains one level on `DATA/natural50_train.fasta.xz` and leaves `STATE/28K.pt`; run again, it goes on
where it stopped. `make.py` beside it measures the losses, fits the maps and writes the checkpoint.

Every step draws its windows and masks from a generator seeded with the step, so that a resumed run
sees what an uninterrupted one would have seen. Matrix products run in bfloat16, the rest in float32.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.backbone import ESM2, Packing, is_residue, tokenize
from rd_torch.config import ALPHABET, Level
from rd_torch.reading import Fasta
from rd_torch.sequences import normalize_sequences

LEVELS = {
    level.name: level
    for level in (
        Level("28K", num_layers=2, width=32, attention_heads=2),
        Level("90K", num_layers=3, width=48, attention_heads=3),
        Level("207K", num_layers=4, width=64, attention_heads=4),
        Level("1M", num_layers=6, width=128, attention_heads=8),
    )
}
SEED = 0
TOKENS = 60_000_000
TOKENS_PER_STEP = 8_192
SHORT_WINDOWS = {128: 0.80, 256: 0.17, 1024: 0.03}  # tokens: share of the steps
LONG_WINDOWS = {512: 0.50, 1024: 0.50}
# Share of the budget after which windows are long. Long ones cost half as much again and bring 0.008
# nats (207K, 8 M tokens); they went to where the distance to the next smaller level was short.
LONG_FROM = {"28K": 1.0, "90K": 1.0, "207K": 0.0, "1M": 0.88}
MUON_RATE, ADAM_RATE = 0.02, 4e-3  # peaks at width 32, see `peak_rates`
WARMUP = 0.02
SECONDS_BETWEEN_STATES = 120
STANDARD_RESIDUES = (4, 24)


def read_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of a FASTA as one array of ids, `<cls>` and `<eos>` included, and their ends."""
    rows = [tokenize([sequence])[0].numpy().astype(np.uint8) for sequence in read_sequences(path)]
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])


def read_sequences(path: Path) -> list[str]:
    """The normalised sequences of a FASTA."""
    return list(normalize_sequences(protein.sequence for protein in Fasta(path)))


def draw_windows(
    stream: np.ndarray, ends: np.ndarray, rng: np.random.Generator, windows: Mapping[int, float]
) -> Tensor:
    """A `(rows, time)` batch of windows of one random size, each token of the stream as likely.

    The last window is cut so that every step has as many tokens: kernels are built once, not every time.
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


def mask_residues(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chooses 15 % of the residues; 80 % of them become `<mask>`, 10 % a random one, 10 % stay.

    Returns the corrupted tokens and the choice, both `(batch, time)`.
    """
    chance = torch.rand(tokens.shape, generator=generator)
    fate = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(*STANDARD_RESIDUES, tokens.shape, generator=generator)
    chosen = (chance < 0.15) & is_residue(tokens)
    corrupted = torch.where(chosen & (fate < 0.8), ALPHABET.mask_idx, tokens)
    return torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, corrupted), chosen


def masked_loss(model: ESM2, tokens: Tensor, corrupted: Tensor, chosen: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy in nats summed over the chosen residues of a padded batch, and their number."""
    packing = Packing.of(tokens != ALPHABET.padding_idx)
    hidden = model(corrupted, packing)[packing.pack(chosen)]
    truth = packing.pack(tokens)[packing.pack(chosen)]
    loss = functional.cross_entropy(model.lm_head(hidden).float(), truth, reduction="sum")
    return loss, int(chosen.sum())


class HalfLinear(nn.Linear):
    """A float32 linear layer whose product runs in bfloat16: three times as fast where the CPU has it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())


class HalfProjection(HalfLinear):
    """The same with its result in float32, for attention, whose backward is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def new_model(level: Level) -> ESM2:
    """A model with fresh weights; residual branches start small, as deep as the model is."""
    torch.manual_seed(SEED)
    model = ESM2(level.num_layers, level.width, level.attention_heads)
    nn.init.normal_(model.embed_tokens.weight, std=0.1)
    for module in model.modules():
        if type(module) is nn.Linear:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.embed_tokens.weight[ALPHABET.padding_idx].zero_()
        for layer in model.layers:
            for linear in (layer.self_attn.out_proj, layer.fc2):
                linear.weight.mul_((2 * level.num_layers) ** -0.5)
    for layer in model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.__class__ = HalfProjection
        for linear in (attention.out_proj, layer.fc1, layer.fc2):
            linear.__class__ = HalfLinear
    return model


def peak_rates(width: int) -> tuple[float, float]:
    """Peak learning rates of Muon and AdamW: wider models take smaller steps."""
    return MUON_RATE * 32 / width, ADAM_RATE * (32 / width) ** 0.5


def new_optimizers(model: ESM2) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for name, p in model.named_parameters() if id(p) not in taken and "contact_head" not in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(progress: float) -> float:
    """Learning rate as a share of its peak: a short rise, then a straight line to zero."""
    return min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


def train(level: Level, data: Path, state_path: Path, tokens_in_all: int = TOKENS) -> None:
    """Trains one level until its budget is spent, writing its state every two minutes and at the end."""
    stream, ends = read_tokens(data / "natural50_train.fasta.xz")
    model, step, seen, seconds, curve = new_model(level), 0, 0, 0.0, []
    optimizers = new_optimizers(model)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, seconds, curve = (state[key] for key in ("step", "seen", "seconds", "curve"))
    begun, written, total, count = time.monotonic(), time.monotonic(), 0.0, 0
    while seen < tokens_in_all:
        windows = LONG_WINDOWS if seen >= LONG_FROM[level.name] * tokens_in_all else SHORT_WINDOWS
        tokens = draw_windows(stream, ends, np.random.default_rng((SEED, step)), windows)
        for optimizer, peak in zip(optimizers, peak_rates(level.width), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(seen / tokens_in_all)
        loss, chosen = masked_loss(model, tokens, *mask_residues(tokens, torch.Generator().manual_seed(step)))
        (loss / chosen).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + TOKENS_PER_STEP
        total, count = total + float(loss.detach()), count + chosen
        if step % 100 == 0:
            curve.append((seen, total / count))
            print(
                f"{level.name} step {step} tokens {seen:,} loss {total / count:.4f} "
                f"{seconds + time.monotonic() - begun:.0f} s",
                flush=True,
            )
            total, count = 0.0, 0
        if time.monotonic() - written > SECONDS_BETWEEN_STATES or seen >= tokens_in_all:
            written = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "seen": seen,
                "seconds": seconds + written - begun,
                "curve": curve,
            }
            torch.save(state, state_path.with_suffix(".part"))
            state_path.with_suffix(".part").replace(state_path)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both scripts of this folder take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("RD_TORCH_DATA"), help="folder of the protein data"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable states")
    return parser


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--level", choices=LEVELS, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.state.mkdir(parents=True, exist_ok=True)
    train(LEVELS[arguments.level], arguments.data, arguments.state / f"{arguments.level}.pt")


if __name__ == "__main__":
    main()
