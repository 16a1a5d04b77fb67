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
    assert len(weights) == 5
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


def test_lower_bounds_are_what_the_oldest_environment_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    bounds = [*project["project"]["dependencies"], *(bound for extra in extras for bound in extra)]
    bounds = [bound.replace(">=", "==") for bound in bounds]
    assert set(bounds) < set(project["dependency-groups"]["oldest"])
    names = {re.split(r"[\[=>]", bound)[0] for bound in bounds}
    imports = {
        name.split(".")[0]
        for path in (ROOT / "rd_torch").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.Import)
            else []
        )
    }
    modules = {"fair-esm": "esm"}
    used = {modules.get(name, name) for name in names}
    theirs = {"transformers", "accelerate"}  # imported where a user's own code has them
    used -= {"onnx", "onnxscript"}  # which torch.onnx imports
    assert used == {name for name in imports if name not in sys.stdlib_module_names} - {"rd_torch"} - theirs


def test_the_documentation_installs_everything_but_fair_esm_beside_the_other_esm():
    page = (ROOT / "docs" / "versions.md").read_text()
    command = re.search(r"^pip install --no-deps \.\npip install ((?:.*\\\n)*.*)$", page, re.M)[1]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = shlex.split(command.replace("\\\n", " "))
    assert listed == [bound for bound in dependencies if not bound.startswith("fair-esm")]
