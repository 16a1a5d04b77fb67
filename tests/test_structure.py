"""The rules of the house that a machine can hold."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rd_torch"
ARCHITECTURE = (PACKAGE / "README.md").read_text()
ROWS = re.findall(r"^\| `([\w/]+(?:\.py)?)` \|", ARCHITECTURE, re.M)
ROOMS = [row for row in ROWS if row.count("/") == row.endswith("/")]
INSIDE = [row for row in ROWS if row not in ROOMS]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
SOURCES = [path for path in FILES if path.name != "__init__.py"]


def room(path):
    """The row of the table that a file belongs to."""
    return f"{path.parts[0]}/" if len(path.parts) > 1 else path.name


def imports(path):
    """What a file imports of the package at any depth, but for type checking: `(module's parts, name)`."""
    tree = ast.parse((PACKAGE / path).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        package, *parts = (node.module or "").split(".")
        if package == "rd_torch":
            for alias in node.names:
                yield (parts, alias.name) if parts else ([alias.name], "")


def imported_rooms(path):
    for parts, _ in imports(path):
        yield f"{parts[0]}/" if (PACKAGE / parts[0]).is_dir() else f"{parts[0]}.py"


def test_the_tables_of_files_are_true():
    assert len(set(ROWS)) == len(ROWS)
    assert set(ROOMS) == {room(path) for path in SOURCES}
    assert set(INSIDE) == {str(path) for path in SOURCES if len(path.parts) > 1}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_file_imports_only_from_rooms_above_it(path):
    if path.name == "__init__.py" and len(path.parts) == 1:
        return
    own, place = room(path), ROOMS.index(room(path))
    assert all(ROOMS.index(other) < place for other in imported_rooms(path) if other != own or "/" not in own)


@pytest.mark.parametrize("path", [path for path in SOURCES if len(path.parts) > 1], ids=str)
def test_within_a_folder_each_file_imports_only_from_files_above_it(path):
    place = INSIDE.index(str(path))
    for (package, *file), _ in imports(path):
        if package == path.parts[0] and path.name != "__main__.py":
            assert file, "a file imports from the face that imports it"
            assert INSIDE.index(f"{package}/{file[0]}.py") < place


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_folder_is_entered_by_its_face(path):
    for (package, *inside), name in imports(path):
        if (PACKAGE / package).is_dir() and room(path) != f"{package}/" and path.name != "__init__.py":
            assert not inside, f"{name} of {package}/{inside[0]}.py is not in the face of {package}/"
            face = importlib.import_module(f"rd_torch.{package}")
            assert not name or name in face.__all__


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
QUESTIONS = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", CONTRIBUTING, re.M)


def names_in(path):
    """What a file defines: functions, classes, their methods, constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize(
    ("name", "place"), re.findall(r"`(\w+)(?:\([^`]*\))?`\s+in\s+`([\w/]+\.py)`", ARCHITECTURE)
)
def test_what_the_architecture_speaks_of_is_there(name, place):
    assert name in names_in(PACKAGE / place)


@pytest.mark.parametrize(
    ("name", "place"), re.findall(r"`(\w+)`\s+in\s+`(rd_torch/[\w/]+\.py)`", CONTRIBUTING)
)
def test_what_contributors_are_told_of_is_there(name, place):
    assert name in names_in(ROOT / place)


@pytest.mark.parametrize(("question", "answer"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_the_answers_to_contributors_are_true(question, answer):
    assert len(QUESTIONS) >= 10
    places = re.findall(r"`(rd_torch/[\w/]+(?:\.py)?)`", answer)
    assert places
    assert all((ROOT / place).exists() for place in places)
    for importer, imported in re.findall(r"`rd_torch/(\S+)` may not import `rd_torch/(\S+)`", answer):
        assert ROOMS.index(importer) < ROOMS.index(imported)
    for imported in re.findall(r"no other file may import `rd_torch/(\S+)`", answer):
        others = [path for path in FILES if room(path) != imported]
        assert not any(imported in imported_rooms(path) for path in others)


FAMILIES = {"ESM2", "ESMC", "FairESM2", "EsmcModel", "SelfAttention", "ESMCLayer"}
AT_HOME = ("backbone/", "weights/", "levels.py", "__init__.py", "oracles.py")


@pytest.mark.parametrize("path", [path for path in FILES if not str(path).startswith(AT_HOME)], ids=str)
def test_no_room_but_backbones_and_their_files_uses_the_classes_of_a_family(path):
    nodes = list(ast.walk(ast.parse((PACKAGE / path).read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {each.name for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names}
    assert not names & FAMILIES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_keep_their_size(path):
    text = (PACKAGE / path).read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, node.name


MEASURING = sorted(path for name in ("benchmarks", "checkpoints") for path in (ROOT / name).rglob("*.py"))


def is_script(path):
    return 'if __name__ == "__main__"' in path.read_text()


def arguments_of(function):
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: str(path.relative_to(ROOT)))
def test_benchmarks_and_recipes_keep_their_size(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, node.name
            assert len(arguments_of(node)) <= 7, node.name


def files_imported_by(path):
    """Files of `benchmarks/` and `checkpoints/` that a file of them imports at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for place in (ROOT, path.parent):
            files = (place / f"{name.replace('.', '/')}.py" for name in names)
            yield from (file for file in files if file in MEASURING)


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_script(path):
    assert not [file for file in files_imported_by(path) if is_script(file)]


def test_scripts_and_what_they_import_are_found():
    speed = ROOT / "benchmarks" / "speed"
    assert is_script(speed / "memory.py")
    assert not is_script(speed / "meter.py")
    assert speed / "meter.py" in files_imported_by(speed / "memory.py")
    recipe = ROOT / "checkpoints" / "esm2-rd-mini"
    assert recipe / "recipe.py" in files_imported_by(recipe / "train.py")


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


def test_facts_and_choices_come_without_torch():
    code = "import sys, rd_torch; rd_torch.ESM2_LEVELS; rd_torch.RDConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


FILES_OF_THE_OTHER = {  # EvolutionaryScale's package of the same name; whoever imports it fails
    "esm/__init__.py": "__version__ = '3.2.1'\nraise ImportError('somebody imported the other package')\n",
    "esm/models/esmc.py": "class ESMC: ...\n",
    "esm/sdk/__init__.py": "def client(): ...\n",
    "esm/pretrained.py": "from esm.models.esmc import ESMC\n",
}
CURE = "run rd-torch verify in an environment of its own, with fair-esm and no other package called esm"


def write_other_esm(folder):
    for name, text in FILES_OF_THE_OTHER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("installed", "verdict"),
    [
        ("fair-esm", "PASSED"),
        (
            "the other",
            f"Error: expected fair-esm for the comparison, got the other package called esm: {CURE}",
        ),
        ("none", f"Error: expected fair-esm for the comparison, got none: {CURE}"),
    ],
)
def test_ordinary_use_imports_no_package_called_esm(tmp_path, installed, verdict):
    places = [str(ROOT)]
    if installed == "the other":
        write_other_esm(tmp_path / "site")
        places.insert(0, str(tmp_path / "site"))
    command = [sys.executable, ROOT / "tests" / "ordinary_use.py"]
    options = {"none": ["--without-esm"], "the other": ["--with-transformers"]}
    result = subprocess.run(
        [*command, *options.get(installed, [])],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == verdict
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_verify_knows_the_other_package_from_fair_esm(tmp_path, monkeypatch, imported, mixed):
    from rd_torch.oracles import require_fair_esm

    require_fair_esm()
    write_other_esm(tmp_path)
    if mixed:
        (tmp_path / "esm" / "model").mkdir()
        (tmp_path / "esm" / "model" / "esm2.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "esm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    if imported:
        (tmp_path / "esm" / "__init__.py").write_text("")
        monkeypatch.setitem(sys.modules, "esm", importlib.import_module("esm"))
    got = "it mixed with the other package called esm" if mixed else "the other package called esm"
    with pytest.raises(ImportError, match=f"^expected fair-esm for the comparison, got {got}: {CURE}$"):
        require_fair_esm()


def test_every_public_name_loads_and_unknown_ones_do_not():
    import rd_torch

    assert all(getattr(rd_torch, name).__doc__ for name in rd_torch.__all__ if name != "ESM2_LEVELS")
    assert set(dir(rd_torch)) == set(rd_torch.__all__) == set(rd_torch._HOMES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rd_torch.nothing  # noqa: B018  # the access is the test
