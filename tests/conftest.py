import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_model, tokens_of


@pytest.fixture(autouse=True)
def forget_compiled():
    """Graphs of one test count against the limit of the next, where both compile one function."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def tokens():
    """Unequal lengths, one residue, masks, rare residues; padding at the right."""
    return tokens_of("MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO", "<mask><mask>", "ACDEFGHIKLMNPQRSTVWY")


@pytest.fixture(scope="session")
def data():
    """The folder of the protein data; docs/guides/weights.md says where they come from."""
    folder = os.environ.get("RD_TORCH_DATA")
    if not folder:
        pytest.skip("RD_TORCH_DATA names no folder")
    return Path(folder).resolve()


@pytest.fixture
def saving(monkeypatch):
    """Moments are saved at the end of every window."""
    monkeypatch.setattr("rd_torch.sums.SECONDS_BETWEEN_SAVES", 0)


@pytest.fixture
def counter(monkeypatch):
    """Counts compilations instead of generating code, and forgets them afterwards."""
    from torch._dynamo.testing import CompileCounter  # takes a second, which most tests need not spend

    from rd_torch.backbone import engine

    counts, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile_(part, backend=counts, **options))
    engine._compile_parts.cache_clear()
    torch.compiler.reset()
    yield counts
    engine._compile_parts.cache_clear()
    torch.compiler.reset()


LONGEST_FIRST = (
    "cluster", "benchmarks", "docs", "resume", "tutorials", "esm2", "training", "scaling", "huggingface",
    "inputs", "family", "dataset", "structure", "finetuning", "model", "frameworks", "backbone_files",
    "automodel_jobs", "esmc_training", "esmc_jobs", "esmc", "processes", "shards", "engine", "soft_sequences",
    "store", "reference", "variants",
)  # fmt: skip
"""Files of tests that take long: no process is to work through one when the others have ended."""


@pytest.fixture
def one_thread():
    """Small products take one thread, on a busy machine above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Files that take long come first; tests marked `cuda` run wherever CUDA is."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
