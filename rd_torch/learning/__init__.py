"""What is learnt from labels: a head on the narrowest embedding that is not worse, and its predictions.

Names load on first use, as those of `rd_torch` do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rd_torch.learning.card import spearman_of, spread_of, table_of
    from rd_torch.learning.curve import draw_widths
    from rd_torch.learning.estimators import HEADS_OF, SETTINGS, FittedHead, fit_heads
    from rd_torch.learning.examples import Examples, read_examples
    from rd_torch.learning.findings import Findings, WidthRow
    from rd_torch.learning.learned import Learned
    from rd_torch.learning.predicting import predict_to_table
    from rd_torch.learning.prediction import Prediction
    from rd_torch.learning.scoring import Judge, Score
    from rd_torch.learning.selecting import Found, Rows, select
    from rd_torch.learning.similar import Groups, group_similar
    from rd_torch.learning.splitting import Split, split_sequences
    from rd_torch.learning.teaching import learn
    from rd_torch.learning.vectors import LearnOptions

_HOMES = {
    "Examples": "examples",
    "Findings": "findings",
    "FittedHead": "estimators",
    "Found": "selecting",
    "Groups": "similar",
    "HEADS_OF": "estimators",
    "Judge": "scoring",
    "LearnOptions": "vectors",
    "Learned": "learned",
    "Prediction": "prediction",
    "Rows": "selecting",
    "SETTINGS": "estimators",
    "Score": "scoring",
    "Split": "splitting",
    "WidthRow": "findings",
    "draw_widths": "curve",
    "fit_heads": "estimators",
    "group_similar": "similar",
    "learn": "teaching",
    "predict_to_table": "predicting",
    "read_examples": "examples",
    "select": "selecting",
    "split_sequences": "splitting",
    "spearman_of": "card",
    "spread_of": "card",
    "table_of": "card",
}

__all__ = [
    "HEADS_OF",
    "SETTINGS",
    "Examples",
    "Findings",
    "FittedHead",
    "Found",
    "Groups",
    "Judge",
    "LearnOptions",
    "Learned",
    "Prediction",
    "Rows",
    "Score",
    "Split",
    "WidthRow",
    "draw_widths",
    "fit_heads",
    "group_similar",
    "learn",
    "predict_to_table",
    "read_examples",
    "select",
    "spearman_of",
    "split_sequences",
    "spread_of",
    "table_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
