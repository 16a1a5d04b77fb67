"""The command `rd-torch fit --from-stores`: fit to embeddings in files, without a backbone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from rd_torch.cli.shared import print_levels, split_by_level
from rd_torch.cli.solving import MAPS_OPTIONS

_TAKEN: Final = ("paths", "output", "from_stores", "levels", "added", *MAPS_OPTIONS)
"""The parameters of `rd-torch fit` that make sense where no protein is read and no backbone runs."""


def fit_from_stores(pairs: tuple[str, ...], output: Path, levels: str | None, **options: Any) -> None:
    """Fit maps to files of raw embeddings, and write them as a checkpoint.

    Args:
        pairs: the files as `LEVEL=FILE`, smallest level first.
        output: the folder to write.
        levels: names of the levels to use, with commas between them; by default all.
        **options: options of `solve_stages` and `change_basis`.
    """
    from rd_torch.choices import check_choice
    from rd_torch.cli.progress import Bar
    from rd_torch.disk import part_folder
    from rd_torch.fitting_stores import fit_stores
    from rd_torch.store import open_store
    from rd_torch.sums import clear_folder
    from rd_torch.weights import require_no_backbones

    inputs = split_by_level(pairs, "files as LEVEL=FILE")
    chosen = choose_levels(levels, inputs)
    for level in chosen:
        check_choice("level", level, tuple(inputs))
    inputs = {level: inputs[level] for level in chosen}
    require_no_backbones(output)
    with open_store(next(iter(inputs.values()))) as first:
        records = len(first)
    work_folder = part_folder(output.resolve())
    work_folder.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"stores": {level: Path(file).name for level, file in inputs.items()}}
    with Bar("record", records) as bar:
        nesting = fit_stores(inputs, progress=bar, provenance=provenance, work_folder=work_folder, **options)
    nesting.save_pretrained(output)
    clear_folder(work_folder)
    print_levels(nesting.config)
    click.echo(f"Wrote the maps to {output}.", err=True)


def require_options_for_stores() -> None:
    """Require that the running command was given no option that is for proteins or backbones.

    Raises:
        ValueError: for such options, with their names.
    """
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _TAKEN
        and context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
    ]
    if given:
        raise ValueError(
            f"expected --from-stores without {' and '.join(given)}, got them together: no protein is read, "
            "and no backbone runs"
        )


def choose_levels(levels: str | None, known: Collection[str]) -> list[str]:
    """Return the names of the levels that `--levels` gives; by default all that are known.

    Of a backbone that is known, any layer may be named, as in `650M@25`.

    Raises:
        ValueError: for a level that is not known, or is named twice.
    """
    from rd_torch.choices import check_choice
    from rd_torch.levels import split_level

    wanted = list(known) if levels is None else levels.split(",")
    for level in wanted:
        if level not in known:
            check_choice("level", split_level(level)[0], tuple(known))
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"expected each level once, got --levels {levels}")
    return wanted
