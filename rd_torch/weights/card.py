"""Write the model card, which tells readers on the Hub what a checkpoint is and how to load it."""

from __future__ import annotations

from collections.abc import Collection

from huggingface_hub import ModelCardData

from rd_torch.config import RDConfig

_TEXT = """---
{metadata}
---

# {name}

{what} (Catrina, Bepler, Sledzieski and Singh,
ICLR 2026, arXiv 2603.07710).
{promise}

| level | layers | backbone width | embedding width | R² of the prediction | {kept} | backbone |
|---|---|---|---|---|---|---|
{rows}

## How to load it

{loading}

## How it was made

{facts}
"""

_CHAIN = "This is a chain of {titles} models with reverse-distilled embeddings"

_MAPS = "These are maps that turn raw embeddings of several models into reverse-distilled ones"

_LOADING = """```python
import rd_torch

model = rd_torch.RDModel.from_pretrained("{name}")  # level="{first}" stops there
vectors = rd_torch.embed(model, ["MQIFVKTLTGKTITLEVEPS"])  # (1, {width})
```"""

_LOADING_MAPS = """The models are not part of it. This nests files of their embeddings, one for each level:

```python
import rd_torch

nesting = rd_torch.Nesting.from_pretrained("{name}")  # level="{first}" stops there
rd_torch.combine_stores(nesting, {{{files}}}, "nested.h5")  # {width} features
```"""

_PROMISES = {
    "rd": "The embedding of each level is, to the bit, the beginning of the next level's embedding.",
    "naive": "It is the baseline that concatenates all embeddings and keeps their principal components; "
    "its levels are not nested.",
}

_KEPT = {"rd": "share of the residual kept", "naive": "share of the variance kept"}

_METHODS = {"rd": "reverse distillation", "naive": "concatenation and principal components"}

_INPUTS = {"nested": "the nested embedding", "previous": "the raw embedding of the previous backbone"}

_SCALES = {
    "feature": "each feature is divided by its standard deviation",
    "block": "the features that one level adds are divided by the root of their mean variance",
}
_NORMS = {True: "the backbone's final LayerNorm", False: "no LayerNorm"}

_SPECIAL_ROWS = {
    "maps": "computed by the maps, as those of residues are",
    "larger": "the largest backbone's own, without the maps",
}


def model_card(config: RDConfig, name: str, included: Collection[str]) -> str:
    """Write the model card, `README.md`, of a checkpoint.

    Args:
        config: the checkpoint's config.
        name: name of the checkpoint.
        included: names of the backbones that the checkpoint holds.

    Returns:
        The text.
    """
    described = all(level.num_layers for level in config.levels)
    loads = all(level.reference or level.backbone in included for level in config.levels)
    titles = list(dict.fromkeys(level.title for level in config.levels))
    families = ["protein language model", *titles] if described else []
    metadata = ModelCardData(
        library_name="rd_torch",
        pipeline_tag="feature-extraction",
        tags=[*families, "embeddings", "reverse distillation"],
    )
    return _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        what=_CHAIN.format(titles=" and ".join(titles)) if described else _MAPS,
        promise=_PROMISES[config.method],
        kept=_KEPT[config.method],
        rows="\n".join(_rows(config, included)),
        loading=(_LOADING if loads else _LOADING_MAPS).format(
            name=name,
            first=config.levels[0].name,
            width=list(config.widths.values())[-1],
            files=", ".join(f'"{level}": "{level}.h5"' for level in config.widths),
        ),
        facts="\n".join(f"- {key}: {value}" for key, value in _facts(config)),
    )


def _rows(config: RDConfig, included: Collection[str]) -> list[str]:
    """Return the table's rows, one for each level."""
    rows = []
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        r2 = f"{explained.r2:.3f}" if explained and explained.r2 is not None else ""
        kept = f"{explained.kept:.3f}" if explained else ""
        place = "included" if level.backbone in included else "not included"
        if level.reference:
            place = f"{level.reference.repo} at {level.reference.revision}"
        layers = level.num_layers or ""
        if level.layer is not None and level.num_layers:
            layers = f"{level.layer} of {level.num_layers}"
        cells = (level.name, layers, level.width, config.widths[level.name], r2, kept, place)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def _facts(config: RDConfig) -> list[tuple[str, object]]:
    """Return how the checkpoint was made: the choices that its config holds, and its provenance."""
    provenance = dict(config.provenance)
    fit = provenance.pop("fit", {})
    norm = config.hidden_norm
    norms = [] if norm is None else [("hidden layers end with", _NORMS[norm])]
    inputs = [("the prediction is made from", _INPUTS[config.predict_from])] if config.is_nested else []
    return [
        ("method", _METHODS[config.method]),
        *inputs,
        *([("features", _describe_basis(config))] if config.has_basis else []),
        ("embeddings of `<cls>`, `<eos>` and `<mask>`", _SPECIAL_ROWS[config.special_rows]),
        *norms,
        ("fitted on", ", ".join(f"{key} {value}" for key, value in fit.items()) or "not recorded"),
        *provenance.items(),
    ]


def _describe_basis(config: RDConfig) -> str:
    """Say in which coordinates the features are."""
    first = config.levels[0].name
    done = [
        f"those of {first} are turned to their principal components" if config.rotate_first else "",
        f"the mean of {first} is subtracted" if config.centre else "",
        _SCALES.get(config.scale, ""),
    ]
    return (
        f"{'; '.join(filter(None, done))}; the first features are {first}'s in new coordinates, and not its "
        "own to the bit"
    )
