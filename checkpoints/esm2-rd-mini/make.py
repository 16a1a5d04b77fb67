"""Measures the trained backbones of esm2-rd-mini, fits the maps and writes the checkpoint.

    python checkpoints/esm2-rd-mini/make.py --data DATA --state STATE

reads what `train.py` left in STATE and writes config, maps, backbones and `losses.json` beside this file, or
to `--output`; `--family esmc` takes the ESM-C-shaped backbones. `--family spoilt` takes two badly
trained backbones, and the shipped ones for the levels below.

A loss is the cross-entropy in nats over 15 % of the residues, chosen at random: 80 % of them are shown as
`<mask>`, 10 % as a random residue, 10 % as they are. Sequences are whole; nothing is cropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from recipe import CHAINS, LEVELS, SCHEDULES, SEED, mask_residues, masked_loss, new_parser, read_sequences

from rd_torch import RDModel, fit
from rd_torch.backbone import FAMILIES, Backbone, tokenize
from rd_torch.levels import ALPHABET, SPECIAL_TOKENS
from rd_torch.sequences import cut_batches

HERE = Path(__file__).parent
MASK_SEEDS = (0, 1, 2)
PART = 200
FITTED_ON = 10_000
CREDIT = "natural50: UniProt and STRING (CC BY 4.0), PDB (CC0), RefSeq; one protein per 50 %-identity cluster"


@torch.no_grad()
def measure(model: Backbone, sequences: Sequence[str], seed: int) -> float:
    """Return the mean masked-residue loss in nats over whole sequences.

    A sequence has the same masks in whatever batch it comes.

    Args:
        model: The backbone.
        sequences: The sequences.
        seed: Seed of the masks.
    """
    total, count = 0.0, 0
    for batch in cut_batches(sequences, 8_192):
        tokens = tokenize([sequence for _, sequence in batch], ALPHABET)
        corrupted, chosen = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
        for row, (index, sequence) in enumerate(batch):
            generator = torch.Generator().manual_seed(seed * 1_000_000 + index)
            length = len(sequence) + SPECIAL_TOKENS
            corrupted[row, :length], chosen[row, :length] = mask_residues(tokens[row, :length], generator)
        loss, residues = masked_loss(model, tokens, corrupted, chosen)
        total, count = total + float(loss), count + residues
    return total / count


def load(state: Path, family: str) -> tuple[dict[str, Backbone], dict[str, dict[str, object]]]:
    """Return the trained backbones, and how each was trained.

    Levels that another family shares with the shipped one are the shipped ones.

    Args:
        state: Folder that `train.py` has filled.
        family: Family whose levels to load.

    Raises:
        ValueError: If a level has not been trained to the end.
    """
    backbones: dict[str, Backbone] = {}
    runs: dict[str, dict[str, object]] = {}
    for name, level in CHAINS[family].items():
        if family != "esm2" and name in LEVELS:
            backbones[name], runs[name] = shipped(name)
            continue
        saved, schedule = torch.load(state / f"{name}.pt", weights_only=True), SCHEDULES[name]
        if saved["seen"] < schedule.tokens:
            raise ValueError(
                f"expected {schedule.tokens:,} tokens of training at level {name}, got {saved['seen']:,}"
            )
        backbones[name] = FAMILIES[level.family].from_tensors(level, saved["model"]).eval()
        curve = [(seen, round(loss, 4)) for seen, loss in islice(saved["curve"], 0, None, 5)]
        runs[name] = {
            "tokens": saved["seen"],
            "long_windows_from": schedule.long_from,
            "seconds": round(saved["seconds"]),
            "training_curve": curve,
        }
    return backbones, runs


def shipped(name: str) -> tuple[Backbone, dict[str, object]]:
    """Return a shipped backbone, and how it was trained."""
    run = json.loads((HERE / "losses.json").read_text())[name]
    facts = ("tokens", "long_windows_from", "seconds", "training_curve")
    return RDModel.from_pretrained(HERE).backbones[name], {fact: run[fact] for fact in facts}


def budgets(names: Sequence[str]) -> dict[str, object]:
    """Return what a checkpoint says of its levels' schedules: less where all had the same budget."""
    tokens = {SCHEDULES[name].tokens for name in names}
    if len(tokens) == 1:
        return {"tokens_per_level": tokens.pop()}
    return {"schedules": {name: asdict(SCHEDULES[name]) for name in names}}


def losses(backbones: Mapping[str, Backbone], sequences: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the validation losses of every level.

    They are the mean over three seeds of the masks, the loss of each seed, and that of a small part.
    """
    found: dict[str, dict[str, object]] = {}
    for name, backbone in backbones.items():
        by_seed = [measure(backbone, sequences, seed) for seed in MASK_SEEDS]
        found[name] = {
            "validation_loss": round(sum(by_seed) / len(by_seed), 4),
            "by_mask_seed": [round(loss, 4) for loss in by_seed],
            f"first_{PART}_sequences_seed_0": round(measure(backbone, sequences[:PART], 0), 4),
        }
        print(f"Level {name} has the losses {found[name]}.", flush=True)
    return found


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--family", choices=CHAINS, default="esm2", help="Family of the backbones.")
    parser.add_argument("--output", type=Path, default=HERE, help="Folder to write; by default this one.")
    arguments = parser.parse_args()
    backbones, runs = load(arguments.state, arguments.family)
    found = losses(backbones, read_sequences(arguments.data / "natural50_valid.fasta.xz"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {name: {**found[name], **runs[name]} for name in backbones}
    (arguments.output / "losses.json").write_text(json.dumps(report, indent=1) + "\n")
    provenance = {
        "backbones": "trained by checkpoints/esm2-rd-mini/train.py as masked language models",
        "data": CREDIT,
        "seed": SEED,
        **budgets(list(backbones)),
        "validation_loss": {name: values["validation_loss"] for name, values in found.items()},
    }
    training = read_sequences(arguments.data / "natural50_train.fasta.xz")[:FITTED_ON]
    model = fit(backbones, training, provenance=provenance)
    model.save_pretrained(arguments.output)
    print(model.config)


if __name__ == "__main__":
    main()
