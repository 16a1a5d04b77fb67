"""`rd-torch env`: what a report of a bug says, on machines that this one is not."""

import json

import pytest
import torch
from click.testing import CliRunner

from rd_torch import hardware
from rd_torch.cli import main

pytestmark = pytest.mark.capability


def shown(*options):
    result = CliRunner().invoke(main, ["env", *options])
    assert result.exit_code == 0, result.output
    return result.output


def facts():
    return json.loads(shown("--json"))


def test_versions_are_those_that_are_installed(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    said = facts()
    assert said["packages"]["torch"] == torch.__version__
    assert said["packages"]["fair-esm"] == "2.0.0"
    assert said["packages"]["triton"] is None or said["packages"]["triton"][0].isdigit()
    assert said["variables"]["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert said["threads"] == torch.get_num_threads()
    (cpu, *_) = said["devices"]
    assert cpu["device"] == "cpu"
    assert 0 < cpu["free"] < cpu["memory"] < 2**20


@pytest.mark.parametrize("fast", [True, False], ids=["AVX512-BF16", "AVX2"])
def test_the_kernels_are_those_that_run(monkeypatch, fast):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: fast)
    monkeypatch.setattr(hardware, "onednn_has", lambda dtype: fast or dtype == torch.float32)
    monkeypatch.setattr(hardware, "is_x86", lambda: True)
    dtypes = facts()["devices"][0]["dtypes"]
    assert dtypes["float32"] == {"products": "oneDNN", "attention": ["buckets"], "emulated": False}
    assert dtypes["bfloat16"] == {
        "products": "oneDNN" if fast else "PyTorch",
        "attention": ["blocks" if fast else "buckets"],
        "emulated": not fast,
    }
    assert ("; emulated, slower than another dtype" in shown()) != fast


def test_a_gpu_is_shown_with_its_kernels(monkeypatch):
    monkeypatch.setattr(hardware, "devices", lambda: [torch.device("cpu"), torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 15 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    hardware.has_varlen.cache_clear()
    gpu = facts()["devices"][1]
    hardware.has_varlen.cache_clear()
    assert (gpu["name"], gpu["memory"], gpu["free"]) == ("Tesla T4, compute capability 7.5", 15.0, 3.0)
    assert gpu["dtypes"]["bfloat16"] == {"products": "PyTorch", "attention": ["buckets"], "emulated": True}
    assert not gpu["dtypes"]["float16"]["emulated"]


def test_it_is_one_screen():
    lines = shown().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
