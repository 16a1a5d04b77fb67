"""What MkDocs adds to the pages: texts of the repository that lie elsewhere, and the commands' help.

A page links to files of the repository by their paths, so that its links hold wherever it is read. On the
site those files become pages or downloads of their own, and the links are turned to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from rd_torch.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "rd_torch/README.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages of the site by the texts that they are."""

LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
COMMANDS = "<!-- the help of every command -->"
HELP_WIDTH = 86


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose texts lie elsewhere, and whatever pages link to outside of `docs/`."""
    waiting = [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    waiting += [ROOT / path for path in PAGES]
    there = {file.src_uri for file in files}
    while waiting:
        path = waiting.pop()
        place = place_of(path)
        if place not in there:
            there.add(place)
            listed = InclusionLevel.INCLUDED if place in PAGES.values() else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place, abs_src_path=str(path), inclusion=listed))
        if path.suffix == ".md":
            waiting += [target for target in linked(path) if place_of(target) not in there]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to where the site has what they lead to, and print the help of the commands."""
    here = Path(str(page.file.abs_src_path)).parent

    def turned(link: re.Match[str]) -> str:
        """Return the link from this page to the place of its target."""
        target = (here / link[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        return f"]({os.path.relpath(place_of(target), Path(page.file.src_uri).parent)}"

    return LINK.sub(turned, markdown).replace(COMMANDS, "\n\n".join(helps()))


def place_of(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    front = "index.md" if name == "README.md" else f"repository/{name}"
    return PAGES.get(name, front)


def linked(page: Path) -> Iterator[Path]:
    """Yield the files of the repository that a page links to."""
    for name in LINK.findall(page.read_text()):
        target = (page.parent / name).resolve()
        if target.is_file() and target.is_relative_to(ROOT):
            yield target


def helps() -> Iterator[str]:
    """Yield a section with the help of each command, as it is printed."""
    group = click.Context(main, info_name="rd-torch", **options_of(main))
    for name, command in main.commands.items():
        context = click.Context(command, group, f"{name}", **options_of(command))
        yield f"## rd-torch {name}\n\n```text\n{command.get_help(context)}\n```"


def options_of(command: click.Command) -> dict[str, Any]:
    """Return a context's options: those of the command, in one width wherever the site is built."""
    return {**command.context_settings, "max_content_width": HELP_WIDTH, "terminal_width": HELP_WIDTH}
