"""A Ray cluster, and workers on it whose errors reach the driver.

Ray is imported here and nowhere else, and nothing here knows of proteins.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import pyarrow as pa

Step: TypeAlias = Callable[[pa.Table], Any]
"""What a worker does to a table of rows; it returns another table, or arrays by column."""

CPUS_OF_A_WORKER: Final = 8
"""Most cores that a worker gets by default: further cores do more for a second worker than for the first."""

_ERRORS: Final = {kind.__name__: kind for kind in (MemoryError, OSError, ValueError)}
"""Errors that a user can act on, by name; a worker passes them to the driver as rows."""


def require_ray() -> Any:
    """Return the package `ray`, with `ray.data` loaded.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ModuleNotFoundError(
            f"expected the package ray, got none ({error}): pip install rd_torch[cluster]"
        ) from error
    return ray


def join(address: str | None = None) -> None:
    """Join a Ray cluster, unless this process is in one already, and switch off Ray's own progress bars.

    Args:
        address: `host:port` of the cluster; by default that of this machine, which is started if none runs.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ConnectionError: where nothing answers at the address.
    """
    ray = require_ray()
    if not ray.is_initialized():
        if address is not None:
            _require_answer(address)
        ray.init(address, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _require_answer(address: str) -> None:
    """Raise a ConnectionError where nobody listens at the address; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"expected the HOST:PORT of a Ray cluster, got {address!r}, where nothing answers: {error}"
        ) from error


@dataclass(frozen=True)
class Workers:
    """How many processes hold a model each, and what each of them gets.

    Attributes:
        count: number of workers; by default as many as the machines of the cluster have room for now.
        num_cpus: number of cores for each worker; by default 1 beside a GPU, else up to 8.
        num_gpus: number of GPUs for each worker, or the share of one; by default 1 where the cluster has any
            GPU, else 0.
    """

    count: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None

    def placed(self) -> Workers:
        """Fill in from the cluster what was left to the default.

        Returns:
            Workers whose count, cores and GPUs are numbers.

        Raises:
            ValueError: where no machine has room for one worker.
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
        """The device that a worker puts its model on; Ray shows each worker its own GPUs and no others."""
        return "cuda" if self.num_gpus else "cpu"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by which `ray.data.Dataset.map_batches` starts these workers.

        Ray replaces a worker that dies, however often that happens.

        Returns:
            Values by argument name.
        """
        placed = self.placed()
        return {
            "compute": require_ray().data.ActorPoolStrategy(size=placed.count),
            "num_cpus": placed.num_cpus,
            "num_gpus": placed.num_gpus,
        }


AS_MANY_AS_FIT: Final = Workers()


class Worker:
    """The object that Ray makes in each process, and calls with one table after the other.

    Args:
        begin: loads what the worker needs, and returns the step that is done to each table.
    """

    def __init__(self, begin: Callable[[], Step]) -> None:
        self._step = begin()

    def __call__(self, table: pa.Table) -> Any:
        return self._step(table)


class ReportingWorker:
    """A `Worker` that sends errors to the driver as rows, because Ray would wrap them in errors of its own.

    Args:
        begin: as for `Worker`, but called with the first table, so that what it raises is sent as a row too.
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
            return _error_table(error)


def stream(tables: Callable[[], Iterator[pa.Table]]) -> Any:
    """Make a dataset of tables, which one task produces while workers already take the first ones.

    Args:
        tables: produces the tables; it is called on one machine of the cluster.

    Returns:
        A `ray.data.Dataset` in which each table is a block.
    """
    dataset = require_ray().data.from_items([0], override_num_blocks=1)
    # A size in bytes. With the default, Ray holds tables back until a block is full.
    dataset.context.target_max_block_size = 1
    # The task asks for no core of its own: the workers may have taken all, and it would wait for ever.
    return dataset.map_batches(
        _report_errors, fn_kwargs={"tables": tables}, batch_format="pyarrow", num_cpus=0
    )


def _report_errors(_: pa.Table, tables: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Yield the tables; an expected error becomes the last of them."""
    try:
        yield from tables()
    except tuple(_ERRORS.values()) as error:
        yield _error_table(error)


def _error_table(error: BaseException) -> pa.Table:
    """Return an error as a table of one row, which `run` raises again on the driver."""
    kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
    return pa.table({"error": [kind], "message": [str(error)]})


def run(
    dataset: Any, begin: Callable[[], Step], workers: Workers, batch_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Send the rows of a dataset through workers.

    Args:
        dataset: the `ray.data.Dataset`.
        begin: what each worker begins with, as for `Worker`.
        workers: number of workers, and what each of them gets.
        batch_size: number of rows that a worker takes at a time.

    Yields:
        The rows that the workers return, as soon as they are there, in any order.

    Raises:
        ValueError: where the reading task or a worker raised one; OSError and MemoryError likewise.
        ChildProcessError: where a worker cannot be started.
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
        # Closing gives the workers back to the cluster, also where the caller stops before the last row.
        with closing(iter(rows.iter_rows())) as returned:
            for row in returned:
                if "error" in row:
                    raise _ERRORS[row["error"]](row["message"])
                yield row
    except ray.exceptions.RayActorError as error:
        raise ChildProcessError(
            f"expected rd_torch in the same version on all machines, got a worker that did not start: {error}"
        ) from error
