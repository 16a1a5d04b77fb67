"""`rd-torch`: arguments and printing, nothing else.

Everything heavy is imported inside the commands, so that `--help` comes at once.
"""

import click

from rd_torch.cli.checkpoints import convert, download, export, info, verify
from rd_torch.cli.combining import combine
from rd_torch.cli.embedding import embed
from rd_torch.cli.environment import env
from rd_torch.cli.fitting import fit
from rd_torch.cli.plotting import plot


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  rd-torch embed proteins.fasta -o embeddings.h5",
)
@click.version_option(package_name="rd_torch")
def main() -> None:
    """Reverse-distilled ESM-2 embeddings.

    The first features of the large model's embedding are the small models' embeddings: embed once,
    cut later.
    """


for command in (embed, combine, plot, fit, info, download, convert, export, verify, env):
    main.add_command(command)
