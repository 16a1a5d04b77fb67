"""The options of `rd-torch fit` that say how maps are solved, from proteins or from stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_args

import click

from rd_torch.choices import PredictFrom, Regressor, Scale
from rd_torch.cli.command import option

MAPS_OPTIONS: Final = ("regressor", "alpha", "predict_from", "scale", "centre", "rotate_first")
"""The parameters that are passed on as they are, as options of `solve_stages` and `change_basis`."""

_OPTIONS: Final = (
    option(
        "--regressor",
        group="Maps",
        type=click.Choice(get_args(Regressor)),
        default="pcr",
        help="Regression that predicts a backbone's embedding from the smaller ones: principal-component "
        "regression (pcr), ordinary least squares (ols), or ridge.",
    ),
    option(
        "--alpha",
        group="Maps",
        type=float,
        default=1.0,
        metavar="NUMBER",
        help="Penalty of the ridge regression, at least 0.",
    ),
    option(
        "--added",
        group="Maps",
        metavar="N,...|all",
        show_default="up to the backbone's width",
        help="Number of features that each stage adds: one number for each level after the first, or all for "
        "as many as the backbone has. Where widths hardly grow the default adds few, 192 from ESM-C 300M to "
        "600M: half of the backbone's width is a better number, 576 for 600M.",
    ),
    option(
        "--predict-from",
        group="Maps",
        type=click.Choice(get_args(PredictFrom)),
        default="nested",
        help="Predict from the nested embedding so far, or from the previous backbone's own embedding.",
    ),
    option(
        "--scale",
        group="Maps",
        type=click.Choice(get_args(Scale)),
        default="none",
        help="Divide each feature by its standard deviation (feature), or the features that one level adds "
        "by the root of their mean variance (block). The first features are then scaled too, and no longer "
        "equal to the bit to the first backbone's.",
    ),
    option(
        "--centre",
        group="Maps",
        is_flag=True,
        help="Subtract the mean of the first backbone's embedding; added features have mean zero.",
    ),
    option(
        "--rotate-first",
        group="Maps",
        is_flag=True,
        help="Turn the first backbone's features to their principal components, the largest first, so that "
        "fewer features than the first level has are the best ones.",
    ),
)


def solving_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, in the order in which its help shows them."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command
