"""What `finetune_residue.py` and `finetune_sequence.py` share: runs that stop early and can be resumed.

A run is one approach at one level with one seed. Approaches:

    baseline    a head on features that need no model; it sees what the frozen head sees in their place
    frozen      the same head on the chain's embeddings, which are computed once
    LoRA        the chain with LoRA on q_proj and v_proj (Hu et al., arXiv 2106.09685), and the head
    full        everything trains

LoRA and full begin with the head that the frozen run of their level and seed ended with, so that they gain
nothing which a longer training of the head alone would have given. A run ends when the validation score has
not risen for `--patience` epochs, and is judged by the test proteins at its best epoch. After every epoch its
state is written to `--folder`: the same command goes on from there, and takes finished runs as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rd_torch
from benchmarks.report import Row, environment, write_result
from benchmarks.speed.contenders import add_data_argument
from rd_torch.heads import Head
from rd_torch.letters import Corrections
from rd_torch.sequences import SPECIAL_TOKENS, Protein, cut_batches, normalize, tokenize
from rd_torch.tokens import is_residue

BASELINE, FROZEN, LORA, FULL = "baseline", "frozen", "LoRA", "full"
APPROACHES = (BASELINE, FROZEN, LORA, FULL)
LEARNING_RATES = {BASELINE: 2e-3, FROZEN: 2e-3, LORA: 2e-3, FULL: 5e-4}
Scores = dict[str, float]
Batch = tuple[Tensor, Tensor | None, Any]


@dataclass(frozen=True)
class Example:
    """A protein and its label: a class a residue, or a number."""

    sequence: str
    label: Any

    @classmethod
    def cut(cls, sequence: str, label: Any, residues: int) -> Example:
        """The example with known letters, cut to so many residues; labels of residues with it."""
        normal = normalize(Protein("", sequence), Corrections(), max_length=residues).sequence
        return cls(normal, label[:residues] if isinstance(label, list) else label)


class Problem(ABC):
    """What one of the two problems is made of.

    Attributes:
        title: what the table is called.
        baseline: the name of the features that need no model, and their number.
        metrics: names of the scores; the first decides when to stop.
        pooled: whether the head sees one vector a protein.
        rows: vectors a batch where only a head trains.
    """

    title: str
    baseline: tuple[str, int]
    metrics: tuple[str, ...]
    pooled: bool
    rows: int

    @abstractmethod
    def read(self, data: Path, residues: int) -> dict[str, list[Example]]:
        """Examples of the sets "train", "valid" and "test"."""

    @abstractmethod
    def head(self, width: int) -> Head:
        """A head for features of the given width."""

    @abstractmethod
    def features(self, sequence: str) -> Tensor:
        """The baseline's features: `(residues, features)`, or `(1, features)` where the head is pooled."""

    @abstractmethod
    def labels(self, labels: Sequence[Any], mask: Tensor) -> Tensor:
        """Labels of a batch, where `mask`, `(batch, time)`, is True at residues."""

    @abstractmethod
    def scores(self, predictions: Tensor, labels: Tensor) -> Scores:
        """The metrics of everything that has a label, in rows."""

    @abstractmethod
    def constant(self, train: Sequence[Example], test: Sequence[Example]) -> tuple[str, Scores]:
        """What somebody scores who knows the training labels and looks at no protein; their name."""


@dataclass
class Progress:
    """How far a run has come; all of it is in its file."""

    epoch: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)
    test: Scores | None = None
    parameters: int = 0


class Features:
    """Batches of features that were computed once: for the baseline and the frozen head."""

    def __init__(self, problem: Problem, features: Sequence[Tensor], examples: Sequence[Example]) -> None:
        self._problem = problem
        self._features = features
        self._examples = examples
        budget = problem.rows * (1 + SPECIAL_TOKENS if problem.pooled else 1)
        sized = ("A" * len(each) for each in features)
        self._batches = [[index for index, _ in batch] for batch in cut_batches(sized, budget)]

    def __iter__(self) -> Iterator[Callable[[], Batch]]:
        for batch in self._batches:
            yield lambda batch=batch: self._made(batch)

    def _made(self, batch: Sequence[int]) -> Batch:
        padded = pad_sequence([self._features[index] for index in batch], batch_first=True)
        lengths = torch.tensor([len(self._features[index]) for index in batch])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        labels = self._problem.labels([self._examples[index].label for index in batch], mask)
        return padded, mask, labels


class Tokens:
    """Batches of tokens: for whatever trains the chain."""

    def __init__(self, problem: Problem, examples: Sequence[Example], tokens_per_batch: int) -> None:
        self._problem = problem
        self._examples = examples
        self._batches = [
            [index for index, _ in batch]
            for batch in cut_batches((each.sequence for each in examples), tokens_per_batch)
        ]

    def __iter__(self) -> Iterator[Callable[[], Batch]]:
        for batch in self._batches:
            yield lambda batch=batch: self._made(batch)

    def _made(self, batch: Sequence[int]) -> Batch:
        tokens = tokenize([self._examples[index].sequence for index in batch])
        labels = [self._examples[index].label for index in batch]
        return tokens, None, self._problem.labels(labels, is_residue(tokens))


def predict(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions of a batch, and the mask that says where residues are."""
    inputs, mask, _ = batch
    if mask is None:
        return module(inputs)["predictions"], is_residue(inputs)
    return module(inputs, mask), mask


@torch.no_grad()
def judge(problem: Problem, module: nn.Module, batches: Features | Tokens) -> Scores:
    """The scores of a set."""
    module.eval()
    head = head_of(module)
    rows, truth = [], []
    for make in batches:
        batch = make()
        predictions, mask = predict(module, batch)
        labelled = head.labelled(batch[2], mask)
        rows.append(predictions[labelled])
        truth.append(batch[2][labelled])
    return problem.scores(torch.cat(rows).float(), torch.cat(truth))


def head_of(module: nn.Module) -> Head:
    """The head of a predictor, or the head itself."""
    return module.head if isinstance(module, rd_torch.Predictor) else module


class Run:
    """One approach at one level with one seed."""

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
        """Whether validation has stopped rising, or the epochs are over."""
        waited = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self.epochs or waited >= self.patience

    def train(
        self,
        module: nn.Module,
        make_sets: Callable[[], dict[str, Any]],
        learning_rate: float,
        seed: int,
    ) -> None:
        """Trains where the file leaves off, until validation stops rising; then judges the test set.

        Args:
            module: a head or a predictor; it ends with its best parameters.
            make_sets: makes the batches of the three sets, where there is something left to do.
            learning_rate: AdamW's.
            seed: of the order of the batches.
        """
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.01)
        self.progress.parameters = sum(parameter.numel() for parameter in trained.values())
        self._load(trained, optimizer)
        progress = self.progress
        done = self.finished and progress.test is not None
        sets = {} if done else make_sets()
        bar = tqdm(total=self.epochs, initial=progress.epoch, desc=self.name, leave=False, disable=None)
        while not self.finished:
            progress.test = None
            start = time.perf_counter()
            self._epoch(module, list(sets["train"]), optimizer, f"{seed} {progress.epoch}")
            score = judge(self.problem, module, sets["valid"])[self.problem.metrics[0]]
            progress.epoch += 1
            progress.curve.append(score)
            if score >= max(progress.curve):
                progress.best_epoch = progress.epoch
                self.best = {name: p.detach().clone() for name, p in trained.items()}
            progress.seconds += time.perf_counter() - start
            self._save(trained, optimizer)
            bar.update()
            bar.set_postfix(valid=f"{score:.4f}", best=f"{max(progress.curve):.4f}")
        bar.close()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.best[name])
        if progress.test is None:
            progress.test = judge(self.problem, module, sets["test"])
            self._save(trained, optimizer)

    def _epoch(
        self,
        module: nn.Module,
        batches: list[Callable[[], Batch]],
        optimizer: torch.optim.Optimizer,
        order: str,
    ) -> None:
        module.train()
        random.Random(order).shuffle(batches)
        torch.manual_seed(random.Random(order).getrandbits(32))  # dropout
        for make in tqdm(batches, desc="batches", leave=False, disable=None):
            batch = make()
            predictions, mask = predict(module, batch)
            optimizer.zero_grad()
            head_of(module).loss(predictions, batch[2], mask).backward()
            optimizer.step()

    def _load(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["parameters"][name])

    def _save(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        state = {
            "progress": asdict(self.progress),
            "best": self.best,
            "parameters": {name: parameter.detach() for name, parameter in trained.items()},
            "optimizer": optimizer.state_dict(),
        }
        unfinished = self.path.with_suffix(".partial")
        torch.save(state, unfinished)
        unfinished.replace(self.path)  # a kill leaves the old state or the new one


class Study:
    """All runs of a problem."""

    def __init__(self, problem: Problem, arguments: argparse.Namespace) -> None:
        self.problem = problem
        self.arguments = arguments
        self.folder = arguments.folder or Path("finetuning") / type(problem).__name__
        self.folder.mkdir(parents=True, exist_ok=True)
        self._require_same()
        sets = problem.read(require(arguments.data), arguments.residues)
        for name, most in (("train", arguments.proteins), ("valid", arguments.proteins_valid)):
            sets[name] = random.Random(0).sample(sets[name], min(most or len(sets[name]), len(sets[name])))
        self.sets = sets
        self.model = rd_torch.RDModel.from_pretrained(arguments.model)
        self._embedded: dict[str, list[Tensor]] = {}

    def _require_same(self) -> None:
        """Refuses a folder that another choice of data or model began."""
        names = ("model", "residues", "proteins", "proteins_valid", "tokens_per_batch")
        chosen = {name: getattr(self.arguments, name) for name in names}
        path = self.folder / "choices.json"
        if path.is_file() and (before := json.loads(path.read_text())) != chosen:
            raise SystemExit(f"expected {self.folder} to be of {chosen}, got {before}: name another --folder")
        path.write_text(json.dumps(chosen))

    def widths(self) -> dict[str, int]:
        """The chain's levels and their widths."""
        return dict(self.model.config.widths)

    def runs(self) -> dict[tuple[str, str, int], Progress]:
        """Every run by approach, level and seed, trained."""
        done = {}
        for approach in self.arguments.approaches:
            levels = [self.problem.baseline[0]] if approach == BASELINE else list(self.widths())
            for level in levels:
                for seed in range(self.arguments.seeds):
                    done[approach, level, seed] = self._run(approach, level, seed).progress
                    scores = done[approach, level, seed].test or {}
                    said = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
                    tqdm.write(f"{approach}, {level}, seed {seed}: {said}")
        return done

    def _run(self, approach: str, level: str, seed: int) -> Run:
        run = Run(
            f"{approach}-{level}-{seed}".replace(" ", "_"),
            self.folder,
            self.problem,
            self.arguments.patience,
            self.arguments.epochs if approach in (LORA, FULL) else self.arguments.epochs_head,
        )
        torch.manual_seed(seed)
        rate = LEARNING_RATES[approach]
        if approach == BASELINE:
            run.train(self.problem.head(self.problem.baseline[1]), self._featured, rate, seed)
        elif approach == FROZEN:
            width = self.widths()[level]
            run.train(self.problem.head(width), partial(self._featured, width), rate, seed)
        else:
            run.train(self._predictor(approach, level, seed), self._tokens, rate, seed)
        return run

    def _predictor(self, approach: str, level: str, seed: int) -> rd_torch.Predictor:
        """The chain up to the level with the head of its frozen run."""
        head = self.problem.head(self.widths()[level])
        head.load_state_dict(self._run(FROZEN, level, seed).best)
        chain = copy.deepcopy(self.model.truncate(level))
        if approach == LORA:
            torch.manual_seed(seed)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            return rd_torch.Predictor(get_peft_model(chain, config), head)
        return rd_torch.Predictor(chain, head)

    def _tokens(self) -> dict[str, Tokens]:
        budget = self.arguments.tokens_per_batch
        return {name: Tokens(self.problem, examples, budget) for name, examples in self.sets.items()}

    def _featured(self, width: int | None = None) -> dict[str, Features]:
        """Batches of the chain's first features, or of the baseline's."""
        made = {}
        for name, examples in self.sets.items():
            if width is None:
                features = [self.problem.features(each.sequence) for each in examples]
            else:
                features = [each[:, :width] for each in self._embeddings(name)]
            made[name] = Features(self.problem, features, examples)
        return made

    def _embeddings(self, name: str) -> list[Tensor]:
        """Of each protein of a set the embedding at full width, of which narrower levels are the start."""
        if name not in self._embedded:
            sequences = [each.sequence for each in self.sets[name]]
            pool = "mean" if self.problem.pooled else "none"
            vectors = rd_torch.embed(self.model, sequences, pool=pool)
            self._embedded[name] = [torch.as_tensor(np.atleast_2d(vector)) for vector in vectors]
        return self._embedded[name]

    def rows(self, runs: dict[tuple[str, str, int], Progress]) -> list[Row]:
        """The table: means over the seeds, and their spread."""
        name, constant = self.problem.constant(self.sets["train"], self.sets["test"])
        said = {m: f"{constant[m]:.4f}" if m in constant else "" for m in self.problem.metrics}
        nothing = {"level": "", "width": None, "trained parameters": 0, "epochs": None}
        rows = [{"approach": name, **nothing, **said}]
        for approach, level in dict.fromkeys((approach, level) for approach, level, _ in runs):
            mine = [run for key, run in runs.items() if key[:2] == (approach, level)]
            row = {
                "approach": level if approach == BASELINE else approach,
                "level": "" if approach == BASELINE else level,
                "width": self.widths().get(level, self.problem.baseline[1]),
                "trained parameters": mine[0].parameters,
                "epochs": round(statistics.mean(run.best_epoch for run in mine), 1),
            }
            for metric in self.problem.metrics:
                scores = [run.test[metric] for run in mine if run.test]
                spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
                row[metric] = f"{statistics.mean(scores):.4f}{spread}"
            rows.append(row)
        return rows

    def draw(self, runs: dict[tuple[str, str, int], Progress], path: Path) -> None:
        """Validation scores by epoch, one panel a level, one colour an approach."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        levels = list(self.widths())
        figure, axes = pyplot.subplots(
            1,
            len(levels),
            figsize=(3.2 * len(levels) + 0.6, 3.4),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        colours = dict(zip(APPROACHES, ("0.55", "tab:blue", "tab:orange", "tab:green"), strict=True))
        for axis, level in zip(axes[0], levels, strict=True):
            for (approach, where, seed), run in runs.items():
                if where in (level, self.problem.baseline[0]):
                    label = (
                        (self.problem.baseline[0] if approach == BASELINE else approach)
                        if seed == 0
                        else None
                    )
                    epochs = range(1, len(run.curve) + 1)
                    axis.plot(epochs, run.curve, color=colours[approach], alpha=0.8, lw=1.3, label=label)
                    axis.plot(run.best_epoch, max(run.curve), "o", color=colours[approach], ms=4)
            axis.set_title(f"{level}, width {self.widths()[level]}", fontsize=10)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_xlabel("epoch")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel(f"{self.problem.metrics[0]}, validation")
        axes[0][-1].legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def require(data: str | Path | None) -> Path:
    """The folder of the data."""
    if data is None:
        raise SystemExit("expected the folder of the protein data in --data or RD_TORCH_DATA, got none")
    return Path(data)


def main(problem: Problem, description: str | None) -> None:
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser)
    parser.add_argument("--model", default="esm2-rd-mini", help="folder, Hub id, or the shipped family")
    parser.add_argument("--folder", type=Path, help="states of the runs, by default finetuning/ here")
    parser.add_argument("--approaches", choices=APPROACHES, nargs="+", default=list(APPROACHES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--proteins", type=int, help="training proteins, by default all")
    parser.add_argument("--proteins-valid", type=int, help="validation proteins, by default all")
    parser.add_argument("--residues", type=int, default=1022, help="residues at which proteins are cut")
    parser.add_argument("--epochs", type=int, default=30, help="at the most, where the chain trains")
    parser.add_argument("--epochs-head", type=int, default=200, help="at the most, where only a head trains")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a better validation score")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="where the chain trains")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--plot", type=Path, help="learning curves, a PNG")
    arguments = parser.parse_args()
    study = Study(problem, arguments)
    runs = study.runs()
    if arguments.plot:
        study.draw(runs, arguments.plot)
    counts = ", ".join(f"{len(examples):,} {name}" for name, examples in study.sets.items())
    title = f"{problem.title}: {arguments.model}, {arguments.seeds} seeds, proteins {counts}"
    write_result(title, study.rows(runs), environment(), arguments.output)
