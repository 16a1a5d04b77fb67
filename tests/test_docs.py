"""What the pages say, typed as they say; what they show, link to and count."""

import json
import re
import warnings

import pytest
import torch
from pages import DOCS, PAGES, PICTURES, ROOT, TUTORIALS, blocks_of, execute, name_of, pictures_of

import rd_torch
from rd_torch import hardware
from rd_torch.exporting import OLDEST_EXPORTER

REPOSITORY = [ROOT / name for name in ("rd_torch/README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
EMULATED = "cpu computes bfloat16 in emulation: results are right, but float32 is faster"


def with_marks(page):
    """The page as a parameter, marked where what it says depends on what the CPU has."""
    marks = [pytest.mark.capability] if "torch.bfloat16" in page.read_text() else []
    return pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES if page not in TUTORIALS])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="(lightning|transformers|accelerate|torch)")
        old = hardware.is_older(torch.__version__, OLDEST_EXPORTER)
        execute(page, tmp_path, leave_out=("rd-torch export",) if old else ())
    ours = {str(each.message) for each in said if each.category is UserWarning}
    emulated = hardware.is_emulated(torch.device("cpu"), torch.bfloat16)
    assert ours <= ({EMULATED} if emulated else set())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_executed_or_for_the_reader_alone(page):
    assert page.read_text().count("```") == 2 * len(blocks_of(page))
    assert {block.language for block in blocks_of(page)} <= {"python", "sh", "text"}


def test_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    texts = "\n".join(page.read_text() for page in [*PAGES, *REPOSITORY])
    typed = "\n".join(block.text for page in PAGES for block in blocks_of(page) if block.language == "sh")
    named = re.findall(r"`make ([a-z-]+)`", texts) + re.findall(r"^make ([a-z-]+)", typed, re.M)
    assert {"demo", "test", "docs"} <= set(named) <= set(targets)


def anchors_of(page):
    """Where links may lead to within a page: its headings, and the names that the reference renders there."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    slugs = {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize("page", [*PAGES, *REPOSITORY], ids=name_of)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), f"{link}#{anchor}"


def test_the_site_has_every_page():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert {page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents} <= set(listed)


def test_pictures_are_small_and_all_are_shown():
    shown = {path for page in PAGES for path in pictures_of(page)}
    assert shown == set(PICTURES.iterdir())
    assert all(path.stat().st_size < 100_000 for path in shown)


def test_the_table_of_levels_is_the_checkpoints():
    page = (DOCS / "guides" / "weights.md").read_text()
    config = json.loads((ROOT / "checkpoints/esm2-rd-mini/config.json").read_text())
    losses = json.loads((ROOT / "checkpoints/esm2-rd-mini/losses.json").read_text())
    explained = [None, *config["explained"]]
    for level, shares in zip(config["levels"], explained, strict=True):
        cells = [
            level["name"],
            level["num_layers"],
            level["width"],
            f"{losses[level['name']]['validation_loss']:.3f}",
        ]
        cells += [f"{shares[key]:.3f}" for key in ("r2", "kept")] if shares else ["", ""]
        assert f"| {' | '.join(map(str, cells))} |" in page


@pytest.mark.parametrize("family", ["ESM-2", "ESM-C"])
def test_the_table_of_families_has_the_published_sizes(family):
    levels = {"ESM-2": rd_torch.ESM2_LEVELS, "ESM-C": rd_torch.ESMC_LEVELS}[family]
    cells = [family, ", ".join(levels), ", ".join(f"{level.width:,}" for level in levels.values())]
    assert f"| {' | '.join(cells)} |" in (DOCS / "guides" / "families.md").read_text()


@pytest.mark.parametrize("page", [*PAGES, *REPOSITORY], ids=name_of)
def test_pages_name_only_files_that_exist(page):
    for path in re.findall(r"`((?:tests|checkpoints|benchmarks|rd_torch)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists() or path == "rd_torch/checkpoints/", path
