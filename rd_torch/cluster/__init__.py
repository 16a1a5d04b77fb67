"""The same jobs on a cluster: Ray Data streams the records, and workers embed them or sum their moments.

One task reads the files window by window, and each worker, which holds a model, takes one window at a time.
The machines share nothing but a file system. A window's files are named by its number, so that a window which
is worked through again, because its worker died, is neither lost nor doubled. Only the driver holds the
store's lock and finishes the store.

Ray is loaded when a job starts: `pip install rd_torch[cluster]`.

Examples:
    >>> import ray
    >>> dataset = ray.data.from_items([{"sequence": "MQIFVK"}, {"sequence": "MKV"}])
    >>> embedded = rd_torch.cluster.embed_dataset(dataset, "esm2-rd-mini", width=48)
    >>> sorted(embedded.take(1)[0])
    ['28K', '90K', 'sequence']
"""

from __future__ import annotations

from rd_torch.cluster.datasets import embed_dataset, fit_dataset
from rd_torch.cluster.jobs import embed_to_store, fit, require_parts
from rd_torch.cluster.records import Records
from rd_torch.cluster.workers import Workers, join

__all__ = [
    "Records",
    "Workers",
    "embed_dataset",
    "embed_to_store",
    "fit",
    "fit_dataset",
    "join",
    "require_parts",
]
