"""The rules of the house that a machine can hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rd_torch"
TABLE = re.findall(r"^\| `([\w/]+(?:\.py)?)` \|", (PACKAGE / "README.md").read_text(), re.M)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
SOURCES = [path for path in FILES if path.name != "__init__.py"]


def room(path):
    """The row of the table that a file belongs to."""
    return f"{path.parts[0]}/" if len(path.parts) > 1 else path.name


def imports(path):
    """Files of the package that a file imports at any depth, but for type checking."""
    tree = ast.parse((PACKAGE / path).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in skipped
            and (node.module or "").startswith("rd_torch.")
        ):
            parts = node.module.split(".")[1:]
            yield f"{parts[0]}/" if (PACKAGE / parts[0]).is_dir() else f"{parts[0]}.py"


def test_the_table_of_files_is_true():
    assert list(dict.fromkeys(TABLE)) == TABLE
    assert set(TABLE) == {room(path) for path in SOURCES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_file_imports_only_from_rooms_above_it(path):
    if path.name == "__init__.py" and len(path.parts) == 1:
        return
    place = TABLE.index(room(path))
    for other in imports(path):
        assert (
            TABLE.index(other) <= place
            if other == room(path) and "/" in other
            else TABLE.index(other) < place
        )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_keep_their_size(path):
    text = (PACKAGE / path).read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, node.name


def test_importing_changes_nothing_global():
    code = """
import argparse, random, logging, torch
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.initial_seed(), random.getstate(), logging.root.level, list(logging.root.handlers),
            torch.is_grad_enabled(), argparse.Namespace in torch.serialization.get_safe_globals())
before = state()
import rd_torch
[getattr(rd_torch, name) for name in rd_torch.__all__]
rd_torch.RDModel.from_pretrained("esm2-rd-mini")
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "expected the package fair-esm, got none: pip install fair-esm"),
        (("esm/__init__.py", "esm/sdk/__init__.py"), "got the other one of that name: pip uninstall esm"),
    ],
)
def test_the_other_package_called_esm_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import rd_torch"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: expected" in result.stderr
    assert message in result.stderr


def test_every_public_name_loads_and_unknown_ones_do_not():
    import rd_torch

    assert all(getattr(rd_torch, name).__doc__ for name in rd_torch.__all__ if name != "ESM2_LEVELS")
    assert set(dir(rd_torch)) == set(rd_torch.__all__) == set(rd_torch._HOMES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rd_torch.nothing  # noqa: B018  # the access is the test
