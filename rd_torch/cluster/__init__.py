"""The same jobs on a cluster: Ray Data streams the records, workers embed them or sum their moments.

A FASTA file is read by one task, window by window, and workers that hold a model take a window each. What the
machines share is a file system: windows are files named by number, so that one which is worked through again,
because its worker died, is neither lost nor doubled. Only the driver holds a store's lock, and finishes it.

Ray is loaded when a job starts: `pip install rd_torch[cluster]`.
"""

from __future__ import annotations

from rd_torch.cluster.jobs import embed_dataset, embed_to_store, fit, fit_dataset, require_parts
from rd_torch.cluster.steps import Records
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
