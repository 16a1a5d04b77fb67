"""Pages of the documentation, typed as they say: block after block, in a folder of their own.

    python tests/pages.py    # draws the pictures of the tutorials anew

Blocks of `python` and `sh` are executed in the order of the page; a block with the title "prints" is what the
block before it printed, to within rounding. Blocks of `text` are for the reader alone.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import esm
import matplotlib as mpl
import torch
from click.testing import CliRunner
from helpers import random_esm2
from matplotlib import style
from PIL import Image

import rd_torch
from rd_torch import RDModel
from rd_torch.cli import main
from rd_torch.weights import PublishedOptions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PICTURES = DOCS / "tutorials" / "pictures"

PRINTS = 'title="prints"'
INSTALLS = ("make ", "pip ", "git ", "cd ")
"""How lines begin that make an environment, which the page is executed in."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Block(NamedTuple):
    """A block of a page, with the line of the page on which it begins."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page):
    """The blocks of a page, in order."""
    text = page.read_text()
    found = re.finditer(r"^```(\w+) *(.*)\n((?s:.*?))^```$", text, re.M)
    return [Block(each[1], each[2], each[3], text[: each.start()].count("\n") + 2) for each in found]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def pictures_of(page):
    """The files of the tutorials' pictures that a page shows."""
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    paths = [(page.parent / each).resolve() for each in shown]
    return [path for path in paths if path.parent == PICTURES]


@contextlib.contextmanager
def without_downloads():
    """Random models in place of fair-esm's, and the shipped family in place of the authors' maps."""
    load = RDModel.from_pretrained

    def load_here(name, level=None, *others, **options):
        if str(name) != "singhlab/plm_reverse_distillation":
            return load(name, level, *others, **options)
        assert options.pop("backbones", {}).keys() <= {level}
        assert set(options) <= {"dtype", "device", *PublishedOptions.__annotations__}
        return load("esm2-rd-mini")

    fair_esms = {"esm2_t6_8M_UR50D": random_esm2(1, 32, 2), "esm2_t12_35M_UR50D": random_esm2(1, 48, 2)}
    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(RDModel, "from_pretrained", load_here))
        for name, module in fair_esms.items():
            patched.enter_context(
                mock.patch.object(esm.pretrained, name, lambda module=module: (module, None))
            )
        yield


def execute(page, folder, *, leave_out=()):
    """Types a page in a folder that holds `proteins.fasta` alone; returns its variables.

    Args:
        page: the page.
        folder: an empty one.
        leave_out: beginnings of the lines that are not to be run.

    Raises:
        AssertionError: for a command that fails, or a block that prints something else than the page says.
    """
    mpl.use("Agg")
    shutil.copy(ROOT / "benchmarks" / "demo.fasta", folder / "proteins.fasta")
    names, printed = {"__name__": "__main__"}, ""
    with contextlib.chdir(folder), style.context(DOCS / "pictures.mplstyle"), without_downloads():
        for block in blocks_of(page):
            if block.language == "python":
                printed = run_python(block, page, names)
            elif block.language == "sh":
                lines = block.text.replace("\\\n", " ").splitlines()
                printed = "".join(run_line(line) for line in lines if not line.startswith(leave_out))
            elif block.title == PRINTS:
                require_alike(printed, block.text, f"{name_of(page)}:{block.line}")
    return names


def run_python(block, page, names):
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, names)
    return said.getvalue()


def run_line(line):
    """What a line of a shell prints."""
    if not line.strip() or line.startswith(("#", *INSTALLS)):
        return ""
    before, _, command = line.rpartition(" | ")
    words = shlex.split(command, comments=True)
    piped = subprocess.run(before, shell=True, check=True, capture_output=True).stdout if before else None
    if words[0] != "rd-torch":
        assert not before
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    result = CliRunner().invoke(main, words[1:], input=piped)
    assert result.exit_code == 0, (line, result.output, result.exception)
    return result.stdout


def require_alike(got, expected, place):
    """Raises an AssertionError where words or whole numbers differ, or fractions by more than rounding."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split(), f"{place} got\n{got}"
    for one, other in zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True):
        digits = len(other.partition(".")[2])
        leave = 10.0**-digits * (3 if digits > 1 else digits)
        near = math.isclose(float(one.replace(",", "")), float(other.replace(",", "")), abs_tol=1.01 * leave)
        assert near, f"{place} expected {other}, got {one} in\n{got}"


def docstring_of(name):
    """What stands below a public name, which a constant does not carry at run time."""
    value = getattr(rd_torch, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        return inspect.cleandoc(value.__doc__)
    home = importlib.import_module(f"rd_torch.{rd_torch._HOMES[name]}")
    body = ast.parse(inspect.getsource(home)).body
    place = next(k for k, node in enumerate(body) if getattr(getattr(node, "target", None), "id", "") == name)
    return inspect.cleandoc(ast.literal_eval(body[place + 1].value))


def run_example(name):
    """Runs the example of a public name, after the imports that the reference names."""
    text = docstring_of(name)
    example = doctest.DocTestParser().get_doctest(text, {"rd_torch": rd_torch, "torch": torch}, name, None, 0)
    assert "\nExamples:\n" in text
    assert example.examples
    said = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not failed, "".join(said)


def keep_small(source, target):
    """Copies a picture; of a PNG no more colours than the eye tells apart there."""
    if target.suffix == ".png":
        Image.open(source).quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            target, optimize=True
        )
    else:
        shutil.copy(source, target)


def draw_pictures():
    """Executes the tutorials and keeps the pictures that they show."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # or each picture says when it was drawn
    PICTURES.mkdir(exist_ok=True)
    for page in TUTORIALS:
        with tempfile.TemporaryDirectory() as folder:
            execute(page, Path(folder))
            for path in pictures_of(page):
                keep_small(Path(folder) / path.name, path)
                sys.stdout.write(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    draw_pictures()
