"""The command `rd-torch fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from rd_torch.choices import Criterion
from rd_torch.cli.backbones import choose_backbones, parse_layers
from rd_torch.cli.command import Command, option
from rd_torch.cli.fitting_stores import fit_from_stores, require_options_for_stores
from rd_torch.cli.reading import (
    proteins_argument,
    reading_options,
    records_of,
    report_failures,
    strict_option,
    take_proteins,
)
from rd_torch.cli.shared import (
    backbone_option,
    budget_option,
    device_option,
    print_levels,
    trust_option,
)
from rd_torch.cli.sharing import cluster_options, join_cluster
from rd_torch.cli.solving import MAPS_OPTIONS, solving_options

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.reading import Proteins
    from rd_torch.sequences import Entry


@click.command(cls=Command)
@proteins_argument
@option(
    "--from-stores",
    group="Input",
    is_flag=True,
    help="Fit to embeddings that you already have. Give their files in place of PROTEINS, each as "
    "LEVEL=FILE, smallest level first.",
)
@option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write the chain to, as a checkpoint.",
)
@option(
    "--backbones",
    group="Model",
    metavar="MODEL",
    show_default="the small family that ships with rd-torch",
    help="Take the backbones of this checkpoint, a folder or a Hub id; or the published sizes of a family, "
    "esm2 or esmc, as far as --levels names them.",
)
@backbone_option
@trust_option
@option(
    "--levels",
    group="Model",
    metavar="A,B,...",
    show_default="all levels",
    help="Use only the backbones of these levels, smallest first.",
)
@solving_options
@option(
    "--choose-layers",
    group="Layers",
    type=click.Choice(get_args(Criterion)),
    show_default="each level is the backbone's last layer, or the one that it names",
    help="Choose the layer of each level: the one with the highest effective rank (rank), of which the added "
    "features hold most (added), or that predicts the labels of --table best (labels).",
)
@option(
    "--layers",
    group="Layers",
    metavar="LIST|all",
    show_default="all, with --choose-layers",
    help="Choose among these layers: 20,25,30 for every backbone, or 150M@20,650M@25,650M@30.",
)
@option(
    "--table",
    group="Layers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Table of sequences with labels, for --choose-layers labels.",
)
@option(
    "--target",
    group="Layers",
    metavar="COLUMN",
    help="Column of --table with the labels, which are numbers or names of classes.",
)
@option(
    "--final-norm/--no-final-norm",
    group="Layers",
    default=True,
    help="Apply the LayerNorm after a backbone's last layer to hidden layers too.",
)
@strict_option
@reading_options
@device_option
@budget_option
@cluster_options
def fit(
    paths: tuple[str, ...],
    from_stores: bool,
    output: Path,
    backbones: str | None,
    sources: tuple[str, ...],
    levels: str | None,
    added: str | None,
    strict: bool,
    device: str | None,
    **options: Any,
) -> None:
    """Fit a new reverse-distilled chain on your proteins.

    \b
      rd-torch fit proteins.fasta -o my-chain
      rd-torch fit proteins.fasta -o ridge --regressor ridge --alpha 10
      rd-torch fit proteins.fasta -o small --backbone 8M=facebook/esm2_t6_8M_UR50D \\
          --backbone 35M=facebook/esm2_t12_35M_UR50D
      rd-torch fit proteins.fasta -o cambrian --backbones esmc --levels 300M,600M
      rd-torch fit proteins.fasta -o others --backbone 150M=hf:airkingbd/dplm_150m \\
          --backbone 650M=hf:airkingbd/dplm_650m
      rd-torch fit proteins.fasta -o middle --backbones esm2 --levels 8M,35M@10,150M@24
      rd-torch fit proteins.fasta -o chosen --choose-layers rank
      rd-torch fit --from-stores 8M=8M.h5 35M=35M.h5 -o my-maps

    PROTEINS are given as for rd-torch embed, and are read once. About 1,000 natural proteins are a good
    start. The command prints the levels of the chain as rd-torch info does.

    A record that cannot be read without doubt is left out. OUTPUT.failed.tsv then lists such records, with
    lines and reasons, and the exit status is 3.

    A level is taken from the last layer of its backbone, unless it names another: 150M@24. Layers above are
    not run. One backbone may have several levels, 150M@16,150M@24. With --choose-layers the one pass over
    PROTEINS sums all candidates; what was chosen, and why, is written into the chain.

    With --from-stores no backbone runs. The files are as for rd-torch combine, but may hold the embeddings of
    any models, by any names of levels. What is written are maps alone, which rd-torch combine takes as
    --model.

    If the command is interrupted, run it again: it continues from what it saved in OUTPUT.part.
    """
    from rd_torch.cli.progress import ResidueBar
    from rd_torch.disk import part_folder
    from rd_torch.sums import clear_folder

    counts = parse_added(added)
    if from_stores:
        require_options_for_stores()
        maps = {name: options[name] for name in MAPS_OPTIONS}
        fit_from_stores(paths, output, levels, added=counts, **maps)
        return
    proteins = take_proteins(paths, options)
    left_out: list[Entry] = []
    work_folder = part_folder(output.resolve())
    work_folder.parent.mkdir(parents=True, exist_ok=True)
    workers = join_cluster(options, device)
    choice = choose_backbones(backbones, sources, levels, options.pop("trusted"))
    options |= _layer_options(options)
    with ResidueBar(proteins) as bar:
        options |= {
            "progress": bar,
            "provenance": {
                "backbones": choice.origin(),
                "fasta": ", ".join(Path(source).name for source in proteins.sources),
            },
            "work_folder": work_folder,
            "added": counts,
        }
        if workers:
            chain = _fit_on_cluster(
                choice.load, proteins, strict, workers=workers, left_out=left_out, **options
            )
        else:
            chain = _fit_here(choice.load(device), proteins, strict, left_out, **options)
    chain.save_pretrained(output)
    clear_folder(work_folder)
    print_levels(chain.config)
    if layers := chain.config.provenance["fit"].get("layers"):
        click.echo(f"Layers were chosen by {layers['chosen by']}.", err=True)
    click.echo(f"Wrote the chain to {output}.", err=True)
    _list_failures(left_out, output)


def _layer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of layers out of a command's options; return those of `rd_torch.fit`."""
    from rd_torch.labelled import read_labelled

    criterion, listed = options.pop("choose_layers"), parse_layers(options.pop("layers"))
    table, target = options.pop("table"), options.pop("target")
    if (table is None, target is None) != ((criterion != "labels"),) * 2:
        raise ValueError("expected --table and --target with --choose-layers labels, and not without")
    taken: dict[str, Any] = {"layers": listed or ("all" if criterion else None)}
    if criterion:
        taken["choose_layers"] = criterion
    if table is not None:
        taken["labelled"] = read_labelled(table, target)
    return taken


def _list_failures(left_out: list[Entry], output: Path) -> None:
    """Write the list of records that could not be read, and end the command with the status for that."""
    from rd_torch.store import Failure, failure_list, write_failures

    path = failure_list(output)
    write_failures(path, [(entry.identifier, Failure.of(entry)) for entry in left_out])
    report_failures(path, len(left_out))


def _fit_here(
    family: dict[str, Any], proteins: Proteins, strict: bool, left_out: list[Entry], **options: Any
) -> RDModel:
    """Fit in this process; add the records that could not be read to `left_out`."""
    from rd_torch.candidates import Candidates, FitOptions
    from rd_torch.fitting import fit_entries
    from rd_torch.letters import Corrections
    from rd_torch.sequences import keep_sound, normalize_entries

    corrections = Corrections()
    candidates = Candidates.of(
        family, **{key: options[key] for key in FitOptions.__annotations__ if key in options}
    )
    if len(candidates.family) > len(candidates.groups):
        size = candidates.moments_bytes / 2**30
        click.echo(f"Moments of {len(candidates.family)} candidate layers take {size:.2f} GiB.", err=True)
    read = normalize_entries(proteins.entries(), corrections, strict=strict, kind=candidates.kind)
    entries = keep_sound(read, left_out)
    chain = fit_entries(candidates, options["progress"].count_read(entries), **options)
    corrections.warn()
    return chain


def _fit_on_cluster(load: Any, proteins: Proteins, strict: bool, **options: Any) -> RDModel:
    """Fit on a cluster, where every worker calls `load`."""
    from rd_torch.cluster import fit as fit_chain

    return fit_chain(load, records_of(proteins, strict=strict), **options)


def parse_added(text: str | None) -> Any:
    """Return what `--added` gives: numbers, `"all"`, or None.

    Raises:
        ValueError: for anything else.
    """
    if text is None or text == "all":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --added as numbers like 16,16 or 'all', got {text!r}") from error
