"""From the wheel, in an empty environment and another folder."""

import ast
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, folder, **options):
    environment = {
        key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=True, **options
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=ROOT)
    return next(folder.glob("*.whl"))


def embeds(environment, folder):
    """Types what a new user would type; returns what was printed."""
    (folder / "proteins.fasta").write_text(">one\nMKTAYIAKQRQISFVK\n>two\nGGSGG\n")
    run(environment / "bin" / "rd-torch", "embed", "proteins.fasta", "-o", "out.h5", folder=folder)
    code = (
        "import h5py, rd_torch; print(rd_torch.__file__);"
        "print(rd_torch.RDModel.from_pretrained('esm2-rd-mini').embed_dim, h5py.File('out.h5')['two'].shape)"
    )
    return run(environment / "bin" / "python", "-c", code, folder=folder)


def test_the_wheel_carries_the_shipped_family_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) == 6  # maps, what reconstructs, four backbones
    assert all(name.startswith("rd_torch/checkpoints/esm2-rd-mini/") for name in weights)
    assert not any(name.startswith(("tests", "benchmarks", "checkpoints")) for name in names)


def test_the_wheel_embeds_from_another_folder(wheel, tmp_path):
    """The same as below with the development environment's libraries, but not its rd_torch."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    target = next(environment.glob("lib/python*/site-packages"))
    (target / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
        "--prefix", environment, "--ignore-installed", wheel, folder=tmp_path,
    )  # fmt: skip
    printed = embeds(environment, tmp_path)
    assert printed.startswith(str(target))
    assert printed.endswith("128 (128,)\n")


@pytest.mark.slow
def test_the_wheel_embeds_in_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pins = run(sys.executable, "-m", "pip", "freeze", "--exclude-editable", folder=tmp_path)
    (tmp_path / "pins.txt").write_text(pins.replace("+cpu", ""))
    run(environment / "bin" / "pip", "install", "--quiet", "-c", "pins.txt", wheel, folder=tmp_path)
    printed = embeds(environment, tmp_path)
    assert printed.startswith(str(environment))
    assert printed.endswith("128 (128,)\n")


def modules_of(requirements):
    """Names under which the packages of requirements are imported."""
    names = {re.split(r"[\[=>]", each)[0] for each in requirements}
    modules = {"fair-esm": "esm", "scikit-learn": "sklearn", "faiss-cpu": "faiss"}
    return {modules.get(name, name) for name in names}


def libraries_imported_by(*folders):
    """Packages of others that the files of folders import at any depth."""
    files = [path for folder in folders for path in folder.rglob("*.py")]
    names = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    beside = {path.stem for path in files if not (path.parent / "__init__.py").exists()}
    ours = {"rd_torch", "benchmarks"} | beside
    return {name.split(".")[0] for name in names} - ours - sys.stdlib_module_names


def test_lower_bounds_are_what_the_oldest_environment_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    bounds = [*project["project"]["dependencies"], *(bound for extra in extras for bound in extra)]
    bounds = [bound.replace(">=", "==") for bound in bounds]
    assert set(bounds) < set(project["dependency-groups"]["oldest"])
    used = modules_of(bounds) - {"onnx", "onnxscript"}  # which torch.onnx imports
    theirs = {"transformers", "accelerate"}  # imported where a user's own code has them
    with_others = {"scipy"}  # which scikit-learn brings
    assert used == libraries_imported_by(ROOT / "rd_torch") - theirs - with_others


def test_benchmarks_and_recipes_declare_what_they_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    imported = libraries_imported_by(ROOT / "benchmarks", ROOT / "checkpoints")
    group = modules_of(groups["benchmarks"])
    optional = {"faesm"}  # compared with where somebody has installed it
    assert imported - optional <= group | modules_of(project["project"]["dependencies"])
    assert group - imported == {"onnx", "onnxscript", "onnxruntime"}  # which `rd_torch.export` needs
    assert {"include-group": "benchmarks"} in groups["dev"]
    assert group <= modules_of(groups["oldest"])


def test_the_documentation_installs_everything_but_fair_esm_beside_the_other_esm():
    page = (ROOT / "docs" / "versions.md").read_text()
    command = re.search(r"^pip install --no-deps \.\npip install ((?:.*\\\n)*.*)$", page, re.M)[1]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = shlex.split(command.replace("\\\n", " "))
    assert listed == [bound for bound in dependencies if not bound.startswith("fair-esm")]


def test_a_release_has_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert version in (ROOT / "CHANGELOG.md").read_text()
