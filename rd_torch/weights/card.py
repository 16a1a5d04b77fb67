"""The model card: what a checkpoint is, in words for whoever finds it on the Hub."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from rd_torch.config import RDConfig

_TEXT = """---
{metadata}
---

# {name}

Reverse-distilled ESM-2 embeddings (Catrina, Bepler, Sledzieski and Singh, ICLR 2026, arXiv 2603.07710):
{promise}

| level | layers | backbone width | embedding width | R² of the prediction | share kept | backbone |
|---|---|---|---|---|---|---|
{rows}

## How to load it

```python
import rd_torch

model = rd_torch.RDModel.from_pretrained("{name}")  # level="{first}" stops there
vectors = rd_torch.embed(model, ["MQIFVKTLTGKTITLEVEPS"])  # (1, {width})
```

## How it was made

- method: {method}; W acts on the {source} embedding; special tokens hold the {special} rows
- fitted on: {fit}
{provenance}
"""

_PROMISES = {
    "rd": "each level's embedding is, to the bit, the beginning of the next one's.",
    "naive": "the baseline, principal components of concatenated embeddings; its levels are not nested.",
}


def model_card(config: RDConfig, name: str) -> str:
    """The text of `README.md` for a checkpoint that goes by `name`."""
    metadata = ModelCardData(
        library_name="rd_torch",
        pipeline_tag="feature-extraction",
        tags=["protein language model", "ESM-2", "embeddings", "reverse distillation"],
    )
    fit = config.provenance.get("fit", {})
    others = {key: value for key, value in config.provenance.items() if key != "fit"}
    return _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        promise=_PROMISES[config.method],
        rows="\n".join(_rows(config)),
        first=config.levels[0].name,
        width=list(config.widths.values())[-1],
        method=config.method,
        source=config.predict_from,
        special=config.special_rows,
        fit=", ".join(f"{key} {value}" for key, value in fit.items()) or "not recorded",
        provenance="\n".join(f"- {key}: {value}" for key, value in others.items()),
    )


def _rows(config: RDConfig) -> list[str]:
    """One row of the table a level."""
    rows = []
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        r2 = f"{explained.r2:.3f}" if explained and explained.r2 is not None else ""
        kept = f"{explained.kept:.3f}" if explained else ""
        home = f"{level.reference.repo} at {level.reference.revision}" if level.reference else "included"
        cells = (level.name, level.num_layers, level.width, config.widths[level.name], r2, kept, home)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows
