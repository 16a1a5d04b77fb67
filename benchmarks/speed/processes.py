"""Processes of their own for what must not see what another measurement left behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_own_process(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call a function of a module in a fresh process, which inherits nothing, and return its result.

    Args:
        function: The function; it and what it takes and returns can be pickled.
        *args: What the function takes.
        **options: What the function takes by name.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()
