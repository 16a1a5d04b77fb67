"""Training runs that stop early and can be resumed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.finetuning.batches import Batches, head_of, judge, predict
from benchmarks.finetuning.problem import Problem, Scores
from rd_torch.disk import write_whole

BASELINE, FROZEN, LORA, FULL = "baseline", "frozen", "LoRA", "full"
APPROACHES = (BASELINE, FROZEN, LORA, FULL)
WEIGHT_DECAY = 0.01


class Key(NamedTuple):
    """What tells one run of a study from another.

    Attributes:
        approach: One of `APPROACHES`.
        level: Level of the family, or the name of the baseline's features.
        seed: Seed of weights, dropout and the order of batches.
    """

    approach: str
    level: str
    seed: int


@dataclass
class Progress:
    """How far a run has come; all of it is in its file.

    Attributes:
        epoch: Number of epochs that were trained.
        best_epoch: Number of the epoch with the best validation score, from 1.
        seconds: Time that training and validation took.
        curve: Validation score after each epoch.
        test: Scores on the test set, once the run has ended.
        parameters: Number of parameters that train.
    """

    epoch: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)
    test: Scores | None = None
    parameters: int = 0


class Run:
    """One approach at one level with one seed.

    Args:
        name: Name of the run and of its file.
        folder: Folder of the file.
        problem: What is asked.
        patience: Number of epochs without a better validation score after which the run ends.
        epochs: Number of epochs at the most.
    """

    def __init__(self, name: str, folder: Path, problem: Problem, patience: int, epochs: int) -> None:
        self.name = name
        self.path = folder / f"{name}.pt"
        self.problem = problem
        self.patience = patience
        self.epochs = epochs
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """Tell whether validation has stopped rising, or the epochs are over."""
        waited = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self.epochs or waited >= self.patience

    def train(
        self,
        module: nn.Module,
        make_sets: Callable[[], Mapping[str, Batches]],
        learning_rate: float,
        seed: int,
    ) -> None:
        """Train from where the file leaves off, until validation stops rising; then judge the test set.

        Args:
            module: A head or a predictor; it ends with its best parameters.
            make_sets: Makes the batches of the three sets, where there is something left to do.
            learning_rate: Learning rate of AdamW.
            seed: Seed of the order of the batches.
        """
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
        self.progress.parameters = sum(parameter.numel() for parameter in trained.values())
        self._load(trained, optimizer)
        progress = self.progress
        done = self.finished and progress.test is not None
        sets = {} if done else make_sets()
        bar = tqdm(total=self.epochs, initial=progress.epoch, desc=self.name, leave=False, disable=None)
        while not self.finished:
            progress.test = None
            start = time.perf_counter()
            self._train_epoch(module, sets["train"], optimizer, f"{seed} {progress.epoch}")
            score = judge(self.problem, module, sets["valid"])[self.problem.metrics[0]]
            self._note(score, trained)
            progress.seconds += time.perf_counter() - start
            self._save(trained, optimizer)
            bar.update()
            bar.set_postfix(valid=f"{score:.4f}", best=f"{max(progress.curve):.4f}")
        bar.close()
        set_parameters(trained, self.best)
        if progress.test is None:
            progress.test = judge(self.problem, module, sets["test"])
            self._save(trained, optimizer)

    def _note(self, score: float, trained: Mapping[str, nn.Parameter]) -> None:
        """Note the validation score of an epoch, and keep the parameters if they are the best so far."""
        progress = self.progress
        progress.epoch += 1
        progress.curve.append(score)
        if score >= max(progress.curve):
            progress.best_epoch = progress.epoch
            self.best = {name: p.detach().clone() for name, p in trained.items()}

    def _train_epoch(
        self, module: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, order: str
    ) -> None:
        """Train on all batches once.

        Args:
            module: A head or a predictor.
            batches: The training set.
            optimizer: What takes the steps.
            order: Text that decides the order of the batches, and dropout.
        """
        module.train()
        shuffled = list(batches)
        random.Random(order).shuffle(shuffled)
        torch.manual_seed(random.Random(order).getrandbits(32))  # dropout
        for make in tqdm(shuffled, desc="batches", leave=False, disable=None):
            batch = make()
            predictions, mask = predict(module, batch)
            optimizer.zero_grad()
            head_of(module).loss(predictions, batch[2], mask).backward()
            optimizer.step()

    def _load(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Take over what the file holds, if there is one."""
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        optimizer.load_state_dict(state["optimizer"])
        set_parameters(trained, state["parameters"])

    def _save(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write everything that the run needs to go on."""
        state = {
            "progress": asdict(self.progress),
            "best": self.best,
            "parameters": {name: parameter.detach() for name, parameter in trained.items()},
            "optimizer": optimizer.state_dict(),
        }
        write_whole(self.path, partial(torch.save, state), durable=False)


@torch.no_grad()
def set_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give parameters the values of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
