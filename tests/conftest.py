import os
from pathlib import Path

import pytest
from helpers import small_model, tokens_of


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def tokens():
    """Unequal lengths, one residue, masks, rare residues; padding at the right."""
    return tokens_of("MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO", "<mask><mask>", "ACDEFGHIKLMNPQRSTVWY")


@pytest.fixture(scope="session")
def data():
    """The folder of the protein data; README.md says where they come from."""
    folder = os.environ.get("RD_TORCH_DATA")
    if not folder:
        pytest.skip("RD_TORCH_DATA names no folder")
    return Path(folder).resolve()
