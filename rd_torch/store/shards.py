"""`Shard`: the windows that one of several processes embeds, which write one store at the same time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple, Self

_SPELLED: Final = re.compile(r"(\d+)/(\d+)")


class Shard(NamedTuple):
    """One of several processes that share the windows of a store: it embeds every `total`-th window.

    Attributes:
        number: number of the process, from 1.
        total: number of processes.
    """

    number: int
    total: int

    @classmethod
    def of(cls, given: str | tuple[int, int], environment: Mapping[str, str] = os.environ) -> Self:
        """Read which shard a process is.

        Args:
            given: `"3/16"`, two numbers, or `"auto"` for what the environment says: of Slurm's array by
                `SLURM_ARRAY_TASK_ID`, `_MIN`, `_STEP` and `_COUNT`, or else by `RANK` and `WORLD_SIZE`, as
                torchrun sets them.
            environment: the environment's variables.

        Returns:
            The shard.

        Raises:
            ValueError: for other text, a number that is not from 1 to the count, or `"auto"` where the
                environment says nothing.
        """
        if given == "auto":
            found = cls(*_read_environment(environment))
        elif isinstance(given, str):
            match = _SPELLED.fullmatch(given)
            if match is None:
                raise ValueError(f"expected a shard as NUMBER/COUNT or auto, got {given!r}")
            found = cls(int(match[1]), int(match[2]))
        else:
            found = cls(*given)
        if not 1 <= found.number <= found.total:
            raise ValueError(f"expected a shard from 1 to its count, got {found.number} of {found.total}")
        return found

    def takes(self, window: int) -> bool:
        """Whether this shard embeds the window of that number, from 0."""
        return window % self.total == self.number - 1


def _read_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the number and the count that the environment says."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, first, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", otherwise))
            for name, otherwise in (("ID", "0"), ("MIN", "0"), ("STEP", "1"))
        )
        if "SLURM_ARRAY_TASK_COUNT" in environment:
            return (task - first) // step + 1, int(environment["SLURM_ARRAY_TASK_COUNT"])
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return int(environment["RANK"]) + 1, int(environment["WORLD_SIZE"])
    raise ValueError(
        "expected SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or RANK and WORLD_SIZE, in the environment "
        "for shard auto, got neither: say it as NUMBER/COUNT"
    )
