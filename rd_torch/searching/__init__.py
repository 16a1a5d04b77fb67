"""Search: the nearest proteins of a store, by a scan of first features and a second look at all of them.

Names load on first use, as those of `rd_torch` do.

Examples:
    >>> rd_torch.searching.columns_of("query,target,similarity")
    ('query', 'target', 'similarity')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rd_torch.searching.building import add_to_index, build_index
    from rd_torch.searching.config import IndexConfig
    from rd_torch.searching.filing import Report, search_to_file
    from rd_torch.searching.finding import Finder
    from rd_torch.searching.hits import COLUMNS, Hit, Transferred, columns_of
    from rd_torch.searching.index import Index, open_index
    from rd_torch.searching.jobs import search, transfer_labels
    from rd_torch.searching.labels import Labels, read_labels

_HOMES = {
    "COLUMNS": "hits",
    "Finder": "finding",
    "Hit": "hits",
    "Index": "index",
    "IndexConfig": "config",
    "Labels": "labels",
    "Report": "filing",
    "Transferred": "hits",
    "add_to_index": "building",
    "build_index": "building",
    "columns_of": "hits",
    "open_index": "index",
    "read_labels": "labels",
    "search": "jobs",
    "search_to_file": "filing",
    "transfer_labels": "jobs",
}

__all__ = [
    "COLUMNS",
    "Finder",
    "Hit",
    "Index",
    "IndexConfig",
    "Labels",
    "Report",
    "Transferred",
    "add_to_index",
    "build_index",
    "columns_of",
    "open_index",
    "read_labels",
    "search",
    "search_to_file",
    "transfer_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
