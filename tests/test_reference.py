"""The reference: every public name is in it once, with an example that runs."""

import re

import pytest
import torch
from pages import DOCS, run_example, without_downloads

import rd_torch
from rd_torch import hardware
from rd_torch.exporting import OLDEST_EXPORTER

PAGES = sorted((DOCS / "reference").glob("*.md"))


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
