"""Embedding files: what is in them, written so that a kill costs little, read by any prefix.

Names load on first use, as those of `rd_torch` do, so that the command line lists formats without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rd_torch.store.facts import Facts, SaveDtype
    from rd_torch.store.failures import Failure, failure_list, read_failures, write_failures
    from rd_torch.store.folder import Folder
    from rd_torch.store.format import Format, Row
    from rd_torch.store.formats import FORMATS, format_of, load_format
    from rd_torch.store.naming import Names
    from rd_torch.store.opening import open_store
    from rd_torch.store.parquet import level_columns
    from rd_torch.store.shards import Shard
    from rd_torch.store.store import Store
    from rd_torch.store.windows import Length, Record, Window, cut_windows, gather
    from rd_torch.store.work import Compute, ProgressCallback, Work

_HOMES = {
    "Compute": "work",
    "FORMATS": "formats",
    "Facts": "facts",
    "Failure": "failures",
    "Folder": "folder",
    "Format": "format",
    "Length": "windows",
    "Names": "naming",
    "ProgressCallback": "work",
    "Record": "windows",
    "Row": "format",
    "SaveDtype": "facts",
    "Shard": "shards",
    "Store": "store",
    "Window": "windows",
    "Work": "work",
    "cut_windows": "windows",
    "failure_list": "failures",
    "format_of": "formats",
    "gather": "windows",
    "level_columns": "parquet",
    "load_format": "formats",
    "open_store": "opening",
    "read_failures": "failures",
    "write_failures": "failures",
}

__all__ = [
    "FORMATS",
    "Compute",
    "Facts",
    "Failure",
    "Folder",
    "Format",
    "Length",
    "Names",
    "ProgressCallback",
    "Record",
    "Row",
    "SaveDtype",
    "Shard",
    "Store",
    "Window",
    "Work",
    "cut_windows",
    "failure_list",
    "format_of",
    "gather",
    "level_columns",
    "load_format",
    "open_store",
    "read_failures",
    "write_failures",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
