"""The command line, `rd-torch`: it reads arguments and prints, and computes nothing.

The commands import what is slow to import when they run, so that every `--help` comes at once.
"""

import click

from rd_torch.cli.checkpoints import convert, download, export, info, verify
from rd_torch.cli.combining import combine
from rd_torch.cli.command import Group
from rd_torch.cli.embedding import embed
from rd_torch.cli.environment import env
from rd_torch.cli.fitting import fit
from rd_torch.cli.learning import learn, predict
from rd_torch.cli.plotting import plot
from rd_torch.cli.searching import index, search
from rd_torch.cli.variants import variants


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  rd-torch embed proteins.fasta -o embeddings.h5",
)
@click.version_option(package_name="rd_torch")
def main() -> None:
    """Reverse-distilled embeddings of proteins.

    The first features of a large model's embedding are the embeddings of the smaller models. So you embed
    once, and cut the embeddings to any width later.
    """


for command in (
    embed,
    combine,
    plot,
    index,
    search,
    variants,
    learn,
    predict,
    fit,
    info,
    export,
    download,
    verify,
    convert,
    env,
):
    main.add_command(command)
