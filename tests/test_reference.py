"""The reference: every public name is in it once, with an example that runs."""

import ast
import doctest
import importlib
import inspect
import re

import pytest
import torch
from pages import DOCS, without_downloads

import rd_torch
from rd_torch import hardware
from rd_torch.exporting import OLDEST_EXPORTER

PAGES = sorted((DOCS / "reference").glob("*.md"))


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


@pytest.mark.parametrize("name", sorted(set(rd_torch.__all__) - {"cluster"}))  # which test_cluster.py runs
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    if name == "export" and hardware.is_older(torch.__version__, OLDEST_EXPORTER):
        pytest.skip("exporting needs a younger PyTorch")
    monkeypatch.chdir(tmp_path)
    with without_downloads():
        run_example(name)


def test_the_reference_has_every_public_name_once():
    rendered = [
        name for page in PAGES for name in re.findall(r"^::: rd_torch\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(rendered) == sorted(rd_torch.__all__)


def test_the_list_of_names_leads_to_each():
    listed = re.findall(
        r"\[`(\w+)`\]\((\w+\.md)#rd_torch\.(\w+)\)", (DOCS / "reference/index.md").read_text()
    )
    assert sorted(name for name, _, _ in listed) == sorted(rd_torch.__all__)
    for name, page, anchor in listed:
        assert name == anchor
        assert f"::: rd_torch.{name}\n" in (DOCS / "reference" / page).read_text() + "\n"
