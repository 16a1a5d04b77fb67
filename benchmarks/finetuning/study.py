"""All training runs of a problem: every approach at every level with every seed."""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm

import rd_torch
from benchmarks.finetuning.batches import Batches, Features, Tokens
from benchmarks.finetuning.problem import Problem
from benchmarks.finetuning.run import BASELINE, FROZEN, FULL, LORA, Key, Progress, Run
from benchmarks.options import data_folder
from rd_torch.heads import Head

LEARNING_RATES = {BASELINE: 2e-3, FROZEN: 2e-3, LORA: 2e-3, FULL: 5e-4}


class Study:
    """All training runs of a problem.

    Args:
        problem: What is asked.
        arguments: The command line of `benchmarks.finetuning.command`.

    Raises:
        SystemExit: If the folder of the runs belongs to other choices of data or model.
    """

    def __init__(self, problem: Problem, arguments: argparse.Namespace) -> None:
        self.problem = problem
        self.arguments = arguments
        self.folder = arguments.folder or Path("finetuning") / type(problem).__name__
        self.folder.mkdir(parents=True, exist_ok=True)
        self._require_same()
        sets = problem.read(data_folder(arguments), arguments.residues)
        for name, most in (("train", arguments.proteins), ("valid", arguments.proteins_valid)):
            sets[name] = random.Random(0).sample(sets[name], min(most or len(sets[name]), len(sets[name])))
        self.sets = sets
        self.model = rd_torch.RDModel.from_pretrained(arguments.model)
        self._embedded: dict[str, list[Tensor]] = {}

    def _require_same(self) -> None:
        """Refuse a folder that another choice of data or model began."""
        names = ("model", "residues", "proteins", "proteins_valid", "tokens_per_batch")
        chosen = {name: getattr(self.arguments, name) for name in names}
        path = self.folder / "choices.json"
        if path.is_file() and (before := json.loads(path.read_text())) != chosen:
            raise SystemExit(f"expected {self.folder} to be of {chosen}, got {before}: name another --folder")
        path.write_text(json.dumps(chosen))

    def widths(self) -> dict[str, int]:
        """Return the chain's levels and their widths."""
        return dict(self.model.config.widths)

    def runs(self) -> dict[Key, Progress]:
        """Train every run to its end, and return how far each has come."""
        done = {}
        for approach in self.arguments.approaches:
            levels = [self.problem.baseline[0]] if approach == BASELINE else list(self.widths())
            for level in levels:
                for seed in range(self.arguments.seeds):
                    key = Key(approach, level, seed)
                    done[key] = self._run(key).progress
                    scores = (done[key].test or {}).items()
                    told = ", ".join(f"{name} {score:.4f}" for name, score in scores)
                    tqdm.write(f"{approach}, {level}, seed {seed}: {told}")
        return done

    def _run(self, key: Key) -> Run:
        """Train a run to its end."""
        trains_chain = key.approach in (LORA, FULL)
        run = Run(
            "-".join(map(str, key)).replace(" ", "_"),
            self.folder,
            self.problem,
            self.arguments.patience,
            self.arguments.epochs if trains_chain else self.arguments.epochs_head,
        )
        torch.manual_seed(key.seed)
        module: rd_torch.Predictor | Head
        make_sets: Callable[[], Mapping[str, Batches]]
        if trains_chain:
            module, make_sets = self._predictor(key), self._tokens
        elif key.approach == BASELINE:
            module, make_sets = self.problem.head(self.problem.baseline[1]), self._featured
        else:
            width = self.widths()[key.level]
            module, make_sets = self.problem.head(width), partial(self._featured, width)
        run.train(module, make_sets, LEARNING_RATES[key.approach], key.seed)
        return run

    def _predictor(self, key: Key) -> rd_torch.Predictor:
        """Return the chain up to the level with the head of its frozen run."""
        head = self.problem.head(self.widths()[key.level])
        head.load_state_dict(self._run(key._replace(approach=FROZEN)).best)
        chain = copy.deepcopy(self.model.truncate(key.level))
        if key.approach == LORA:
            torch.manual_seed(key.seed)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            return rd_torch.Predictor(get_peft_model(chain, config), head)
        return rd_torch.Predictor(chain, head)

    def _tokens(self) -> dict[str, Tokens]:
        """Make batches of tokens for the three sets."""
        budget = self.arguments.tokens_per_batch
        return {name: Tokens(self.problem, examples, budget) for name, examples in self.sets.items()}

    def _featured(self, width: int | None = None) -> dict[str, Features]:
        """Make batches of the chain's first features, or without a width of the baseline's."""
        made = {}
        for name, examples in self.sets.items():
            if width is None:
                features = [self.problem.features(each.sequence) for each in examples]
            else:
                features = [each[:, :width] for each in self._embeddings(name)]
            made[name] = Features(self.problem, features, examples)
        return made

    def _embeddings(self, name: str) -> list[Tensor]:
        """Return each protein's embedding at full width, of which narrower levels are the start."""
        if name not in self._embedded:
            sequences = [each.sequence for each in self.sets[name]]
            pool = "mean" if self.problem.pooled else "none"
            vectors = rd_torch.embed(self.model, sequences, pool=pool)
            self._embedded[name] = [torch.as_tensor(np.atleast_2d(vector)) for vector in vectors]
        return self._embedded[name]
