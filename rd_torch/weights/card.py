"""Write the model card, which tells readers on the Hub what a checkpoint is and how to load it."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from rd_torch.config import RDConfig

_TEXT = """---
{metadata}
---

# {name}

This is a chain of ESM-2 models with reverse-distilled embeddings (Catrina, Bepler, Sledzieski and Singh,
ICLR 2026, arXiv 2603.07710).
{promise}

| level | layers | backbone width | embedding width | R² of the prediction | {kept} | backbone |
|---|---|---|---|---|---|---|
{rows}

## How to load it

```python
import rd_torch

model = rd_torch.RDModel.from_pretrained("{name}")  # level="{first}" stops there
vectors = rd_torch.embed(model, ["MQIFVKTLTGKTITLEVEPS"])  # (1, {width})
```

## How it was made

{facts}
"""

_PROMISES = {
    "rd": "The embedding of each level is, to the bit, the beginning of the next level's embedding.",
    "naive": "It is the baseline that concatenates all embeddings and keeps their principal components; "
    "its levels are not nested.",
}

_KEPT = {"rd": "share of the residual kept", "naive": "share of the variance kept"}

_METHODS = {"rd": "reverse distillation", "naive": "concatenation and principal components"}

_INPUTS = {"nested": "the nested embedding", "previous": "the raw embedding of the previous backbone"}

_SPECIAL_ROWS = {
    "maps": "computed by the maps, as those of residues are",
    "larger": "the largest backbone's own, without the maps",
}


def model_card(config: RDConfig, name: str) -> str:
    """Return the text of the model card, `README.md`, of a checkpoint that is called `name`."""
    metadata = ModelCardData(
        library_name="rd_torch",
        pipeline_tag="feature-extraction",
        tags=["protein language model", "ESM-2", "embeddings", "reverse distillation"],
    )
    return _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        promise=_PROMISES[config.method],
        kept=_KEPT[config.method],
        rows="\n".join(_rows(config)),
        first=config.levels[0].name,
        width=list(config.widths.values())[-1],
        facts="\n".join(f"- {key}: {value}" for key, value in _facts(config)),
    )


def _rows(config: RDConfig) -> list[str]:
    """Return the table's rows, one for each level."""
    rows = []
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        r2 = f"{explained.r2:.3f}" if explained and explained.r2 is not None else ""
        kept = f"{explained.kept:.3f}" if explained else ""
        place = f"{level.reference.repo} at {level.reference.revision}" if level.reference else "included"
        cells = (level.name, level.num_layers, level.width, config.widths[level.name], r2, kept, place)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def _facts(config: RDConfig) -> list[tuple[str, object]]:
    """Return how the checkpoint was made: the choices that its config holds, and its provenance."""
    provenance = dict(config.provenance)
    fit = provenance.pop("fit", {})
    inputs = [("the prediction is made from", _INPUTS[config.predict_from])] if config.is_nested else []
    return [
        ("method", _METHODS[config.method]),
        *inputs,
        ("embeddings of `<cls>`, `<eos>` and `<mask>`", _SPECIAL_ROWS[config.special_rows]),
        ("fitted on", ", ".join(f"{key} {value}" for key, value in fit.items()) or "not recorded"),
        *provenance.items(),
    ]
