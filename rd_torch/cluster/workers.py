"""Ray alone: a cluster to join, workers on it, and what is said when they fail; knows nothing of proteins."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import pyarrow as pa

Step: TypeAlias = Callable[[pa.Table], Any]
"""What a worker does to a table of rows: gives another one, or arrays by column."""

CPUS_OF_A_WORKER: Final = 8
"""Cores from which further ones help one model less than a second model."""

_ERRORS: Final = {kind.__name__: kind for kind in (MemoryError, OSError, ValueError)}


def require_ray() -> Any:
    """The package `ray`, with `ray.data`.

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ModuleNotFoundError(
            f"expected the package ray, got none ({error}): pip install rd_torch[cluster]"
        ) from error
    return ray


def join(address: str | None = None) -> None:
    """Joins a Ray cluster, unless this process is in one; for programs that show a progress of their own.

    Args:
        address: `host:port` of the cluster; by default the one on this machine, started if need be.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ConnectionError: for an address where nothing answers.
    """
    ray = require_ray()
    if not ray.is_initialized():
        if address is not None:
            _require_answer(address)
        ray.init(address, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _require_answer(address: str) -> None:
    """Raises a ConnectionError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"expected the HOST:PORT of a Ray cluster, got {address!r}, where nothing answers: {error}"
        ) from error


@dataclass(frozen=True)
class Workers:
    """The processes that hold a model each.

    Attributes:
        count: how many; by default as many as the machines of the cluster have room for now.
        num_cpus: cores of each; by default 1 beside a GPU, else up to 8.
        num_gpus: GPUs of each, or a share of one; by default 1 where the cluster has any, else 0.
    """

    count: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None

    def placed(self) -> Workers:
        """The same with what is not given filled in from the cluster.

        Raises:
            ValueError: for workers that no machine has room for.
        """
        nodes = [node["Resources"] for node in require_ray().nodes() if node["Alive"]]
        gpus, cpus = self.num_gpus, self.num_cpus
        if gpus is None:
            gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        if cpus is None:
            least = min((node["CPU"] for node in nodes if node.get("CPU")), default=1)
            cpus = 1 if gpus else min(CPUS_OF_A_WORKER, least)
        wanted = {"CPU": cpus, "GPU": gpus}
        room = sum(
            int(min(node.get(kind, 0) / number for kind, number in wanted.items() if number))
            for node in nodes
        )
        if not (self.count or room):
            raise ValueError(
                f"expected a machine with {cpus:g} CPUs and {gpus:g} GPUs for a worker, got a cluster without"
            )
        return Workers(self.count or room, cpus, gpus)

    @property
    def device(self) -> str:
        """Where the model of each goes; Ray shows a worker its own GPUs alone."""
        return "cuda" if self.num_gpus else "cpu"

    def arguments(self) -> dict[str, Any]:
        """What `ray.data.Dataset.map_batches` is told of them: it replaces those that die, without end."""
        placed = self.placed()
        return {
            "compute": require_ray().data.ActorPoolStrategy(size=placed.count),
            "num_cpus": placed.num_cpus,
            "num_gpus": placed.num_gpus,
        }


class Worker:
    """What Ray makes one of in each process.

    Args:
        begin: loads what is needed, and says what is done to a table.
    """

    def __init__(self, begin: Callable[[], Step]) -> None:
        self._step = begin()

    def __call__(self, table: pa.Table) -> Any:
        return self._step(table)


class ReportingWorker:
    """The same, whose expected errors reach the driver as rows: Ray would wrap them in its own.

    Args:
        begin: as for `Worker`; called with the first table.
    """

    def __init__(self, begin: Callable[[], Step]) -> None:
        self._begin = begin
        self._step: Step | None = None

    def __call__(self, table: pa.Table) -> Any:
        if "error" in table.column_names:
            return table
        try:
            self._step = self._step or self._begin()
            return self._step(table)
        except tuple(_ERRORS.values()) as error:
            return _failed(error)


def stream(tables: Callable[[], Iterator[pa.Table]]) -> Any:
    """A `ray.data.Dataset` of the tables that one task makes while they are worked through, each a block."""
    dataset = require_ray().data.from_items([0], override_num_blocks=1)
    dataset.context.target_max_block_size = 1  # in bytes: nothing is held back until a block is full
    # Without a core of its own: the workers may have taken all.
    return dataset.map_batches(_reported, fn_kwargs={"tables": tables}, batch_format="pyarrow", num_cpus=0)


def _reported(_: pa.Table, tables: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """The tables; an expected error is the last of them."""
    try:
        yield from tables()
    except tuple(_ERRORS.values()) as error:
        yield _failed(error)


def _failed(error: BaseException) -> pa.Table:
    kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
    return pa.table({"error": [kind], "message": [str(error)]})


def run(
    dataset: Any, begin: Callable[[], Step], workers: Workers, batch_size: int = 1
) -> Iterator[dict[str, Any]]:
    """The rows that workers make of a dataset's, in any order, as they come.

    Raises:
        ValueError, OSError, MemoryError: what reader or workers raised.
        ChildProcessError: when a worker cannot be started.
    """
    ray = require_ray()
    rows = dataset.map_batches(
        ReportingWorker,
        fn_constructor_args=(begin,),
        batch_size=batch_size,
        batch_format="pyarrow",
        **workers.arguments(),
    )
    try:
        with closing(iter(rows.iter_rows())) as made:  # gives the workers back, whatever happens
            for row in made:
                if "error" in row:
                    raise _ERRORS[row["error"]](row["message"])
                yield row
    except ray.exceptions.RayActorError as error:
        raise ChildProcessError(
            f"expected rd_torch in the same version on all machines, got a worker that did not start: {error}"
        ) from error
