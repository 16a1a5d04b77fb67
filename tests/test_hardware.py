"""What hardware can: every question, both of its answers; and PyTorch without what is young or private."""

import ast
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_sequence, small_model, tokens_of
from torch import nn
from torch.nn import functional

from rd_torch import hardware
from rd_torch.backbone.linear import project

pytestmark = pytest.mark.capability

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CACHED = [each for each in vars(hardware).values() if hasattr(each, "cache_clear")]
SEQUENCES = ("M", random_sequence(40), "MK<mask>VL")


def forget():
    for each in CACHED:
        each.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Answers are asked anew, of whatever a test puts in the place of PyTorch's own."""
    for name in hardware.ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def make_cpu(machine, capability="AVX512", bf16=True, onednn=(), kind="x86_64"):
    """A CPU of that kind: PyTorch's kernels, AVX512-BF16, and what oneDNN says that it multiplies."""
    machine.setattr(hardware.platform, "machine", lambda: kind)
    machine.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    machine.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    answers = {f"_is_mkldnn_{name}_supported": lambda name=name: name in onednn for name in ("bf16", "fp16")}
    machine.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=None, **answers))


@pytest.mark.parametrize(
    ("cpu", "bfloat16", "attention", "emulated"),
    [
        ({"onednn": ("bf16",)}, "oneDNN", "blocks", {torch.float16}),
        ({"onednn": ("bf16", "fp16")}, "oneDNN", "blocks", set()),
        ({"bf16": False, "onednn": ("bf16",)}, "oneDNN", "buckets", {torch.float16, torch.bfloat16}),
        ({"capability": "AVX2", "bf16": False}, "PyTorch", "buckets", {torch.float16, torch.bfloat16}),
        ({"capability": "DEFAULT", "bf16": False}, "PyTorch", "buckets", {torch.float16, torch.bfloat16}),
        (
            {"kind": "aarch64", "capability": "SVE256", "bf16": False, "onednn": ("bf16", "fp16")},
            "oneDNN", "buckets", set(),
        ),
        (
            {"kind": "arm64", "capability": "DEFAULT", "bf16": False},
            "PyTorch", "buckets", {torch.float16, torch.bfloat16},
        ),
    ],
    ids=["AVX512-BF16", "AVX512-FP16", "AVX512 alone", "AVX2", "SSE", "ARM with bf16", "ARM without"],
)  # fmt: skip
def test_a_cpu_takes_the_kernels_that_it_has(machine, cpu, bfloat16, attention, emulated):
    make_cpu(machine, **cpu)
    assert hardware.product_kernel(CPU, torch.bfloat16) == bfloat16
    assert hardware.product_kernel(CPU, torch.float32) == "oneDNN"
    assert hardware.product_kernel(CPU, torch.float64) == "PyTorch"
    assert hardware.attention_kernel(CPU, torch.bfloat16, 64) == attention
    assert hardware.attention_kernel(CPU, torch.float32, 64) == "buckets"
    dtypes = (*hardware.HALF, *hardware.FULL)
    assert {dtype for dtype in dtypes if hardware.is_emulated(CPU, dtype)} == emulated


@pytest.mark.parametrize("name", hardware.ISA_LIMITS)
@pytest.mark.parametrize(
    ("limit", "held"), [("AVX2", True), ("avx2_vnni", True), ("SSE41", True), ("AVX512_CORE_BF16", False)]
)
def test_a_cpu_whose_libraries_are_held_to_less_answers_as_one_that_has_less(machine, name, limit, held):
    make_cpu(machine, onednn=("bf16", "fp16"))
    machine.setenv(name, limit)
    assert hardware.lacks_avx512() == held
    assert hardware.multiplies_bfloat16(CPU) != held
    assert hardware.onednn_has(torch.bfloat16) != held
    assert hardware.onednn_has(torch.float32)


def test_the_answers_of_this_machine_are_those_of_a_new_process_held_to_avx2():
    """What `make test-portable` relies on."""
    code = (
        "import torch; from rd_torch import hardware as h; cpu = torch.device('cpu');"
        "assert h.cpu_capability() in ('AVX2', 'DEFAULT') or not h.is_x86();"
        "assert not h.multiplies_bfloat16(cpu);"
        "assert h.onednn_has(torch.bfloat16) <= (not h.is_x86()); print('held')"
    )
    held = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert run(code, held).stdout == "held\n"


def run(code, changes=None):
    """A process of its own."""
    environment, command = os.environ | (changes or {}), [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def make_gpu(machine, capability):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(hardware, "attends_rightly", lambda *_: True)


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "kernel"),
    [
        ((9, 0), torch.float16, 64, "varlen"),
        ((8, 0), torch.bfloat16, 16, "varlen"),
        ((8, 0), torch.bfloat16, 20, "buckets"),
        ((8, 0), torch.float16, 256, "buckets"),
        ((8, 0), torch.float32, 64, "buckets"),
        ((7, 5), torch.float16, 64, "buckets"),
    ],
)
def test_a_gpu_takes_the_kernel_that_it_has(machine, capability, dtype, size, kernel):
    make_gpu(machine, capability)
    machine.setattr(hardware, "varlen_attn", lambda: print)
    assert hardware.attention_kernel(CUDA, dtype, size) == kernel
    assert hardware.product_kernel(CUDA, dtype) == "PyTorch"
    assert hardware.is_emulated(CUDA, dtype) == (dtype == torch.bfloat16 and capability < (8, 0))


def attention(q, k, v, edges, _, longest, __):
    """What `varlen_attn` computes, on any device."""
    parts = [slice(*pair) for pair in pairwise(edges.tolist())]
    assert longest == max(part.stop - part.start for part in parts)
    mixed = [
        functional.scaled_dot_product_attention(*(each[part].transpose(0, 1) for each in (q, k, v)))
        for part in parts
    ]
    return torch.cat([each.transpose(0, 1) for each in mixed])


def leaky(q, k, v, *rest):
    """One that lets sequences see each other."""
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return attention(q, k, v, whole, whole, len(q), len(q))


def unbuilt(*_):
    raise RuntimeError("no kernel image is available for execution on the device\nCompile with ...")


@pytest.mark.parametrize("dtype", hardware.HALF, ids=str)
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (attention, None),
        (
            leaky,
            r"varlen_attn is not used on cpu in \w+: it is off by [\d.]+; scaled dot-product",
        ),
        (lambda q, *_: q * float("nan"), "it is off by nan"),
        (unbuilt, "no kernel image is available for execution on the device; scaled dot-product"),
    ],
    ids=["right", "leaky", "NaN", "unbuilt"],
)
def test_attention_of_a_gpu_is_used_where_it_is_right(kernel, message, dtype, size):
    if message is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert hardware.attends_rightly(kernel, CPU, dtype, size)
        return
    with pytest.warns(UserWarning, match=message):
        assert not hardware.attends_rightly(kernel, CPU, dtype, size)


def test_a_gpu_whose_attention_is_wrong_takes_buckets(machine):
    make_gpu(machine, (12, 0))
    machine.setattr(hardware, "varlen_attn", lambda: print)
    machine.setattr(hardware, "attends_rightly", lambda *_: False)
    assert hardware.attention_kernel(CUDA, torch.float16, 64) == "buckets"


def test_an_old_gpu_is_told_that_float16_is_faster_than_bfloat16(machine):
    make_gpu(machine, (7, 5))
    with pytest.warns(UserWarning, match=r"cuda:0 computes bfloat16 in emulation: .* float16 is faster"):
        hardware.warn_if_emulated(CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu"), ("meta", "meta")]
)
def test_float64_lives_where_it_exists(device, expected):
    assert hardware.float64_device(torch.device(device)) == torch.device(expected)
    assert not hardware.is_emulated(torch.device("meta"), torch.float16)


def test_free_memory_is_what_the_system_says(machine):
    assert 0 < hardware.free_bytes(CPU) < 2**50
    assert hardware.free_bytes(torch.device("meta")) is None
    machine.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    machine.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    machine.setattr(torch.cuda, "mem_get_info", lambda device: (7, 11))
    assert hardware.free_bytes(CUDA) == 9


@pytest.mark.parametrize(("precision", "exact"), [("highest", True), ("high", False), ("medium", False)])
def test_float32_is_exact_on_a_gpu_unless_somebody_allowed_tf32(machine, precision, exact):
    machine.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert hardware.has_exact_float32(CUDA) == exact
    assert hardware.has_exact_float32(CPU)


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_best_device_is_a_gpu_where_there_is_one(machine, there, device):
    machine.setattr(torch.cuda, "is_available", lambda: there)
    assert hardware.best_device() == torch.device(device)


@pytest.mark.parametrize("version", ["2.5.1+cu121", "1.13.0"])
def test_a_pytorch_that_is_too_old_is_refused_with_its_version(version):
    code = f"import torch; torch.__version__ = {version!r}; import rd_torch; rd_torch.RDModel"
    assert f"ImportError: expected torch 2.6 or newer, got torch {version}" in run(code).stderr


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "2.14.1", "3.0.0a0+git123"])
def test_a_pytorch_that_is_new_enough_is_taken(version):
    hardware.require_torch(version)


# Without what is young or private in PyTorch, by the public way behind it


class Without:
    """A namespace of PyTorch's without some names."""

    def __init__(self, holder, *names):
        self._holder, self._names = holder, names

    def __getattr__(self, name):
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._holder, name)


def trained(model, tokens):
    """Embeddings, and the gradient of every parameter."""
    embeddings = model(tokens).embeddings
    embeddings.square().mean().backward()
    gradients = [p.grad.clone() for p in model.backbones.parameters() if p.grad is not None]
    model.zero_grad()
    return [embeddings.detach(), *gradients]


PRIVATE = {
    "oneDNN's operator": (torch.ops, "mkldnn", Without(torch.ops.mkldnn, "_linear_pointwise")),
    "oneDNN's answers": (
        torch.ops,
        "mkldnn",
        Without(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"),
    ),
    "autograd's questions": (
        torch._C,
        "_autograd",
        Without(torch._C._autograd, "_saved_tensors_hooks_is_enabled", "_top_saved_tensors_default_hooks"),
    ),
    "the CPU's capabilities": (torch, "cpu", Without(torch.cpu, "get_capabilities")),
    "all that is known of the CPU": (
        torch,
        "cpu",
        Without(torch.cpu, "get_capabilities", "_is_avx512_bf16_supported"),
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_what_is_private_the_numbers_are_the_same(machine, name, dtype):
    holder, attribute, without = PRIVATE[name]
    model, tokens = small_model().to(dtype), tokens_of(*SEQUENCES)
    expected = trained(model, tokens)
    machine.setattr(holder, attribute, without)
    forget()
    got = trained(model, tokens)
    unit = 2e-5 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= unit * max(1.0, float(theirs.abs().max()))


def test_without_varlen_attention_a_gpu_takes_buckets(machine):
    make_gpu(machine, (9, 0))
    machine.setitem(sys.modules, "torch.nn.attention.varlen", None)
    machine.delattr(torch.nn.attention, "varlen", raising=False)
    assert hardware.varlen_attn() is None
    assert hardware.attention_kernel(CUDA, torch.float16, 64) == "buckets"


def test_without_onednn_a_linear_layer_is_pytorchs(machine):
    layer, x = nn.Linear(64, 48), torch.randn(7, 64)
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert hardware.product_kernel(CPU, torch.float32) == "PyTorch"
    assert torch.equal(project(layer, x), functional.linear(x, layer.weight, layer.bias))


ASKED = {
    *("psutil", "_C", "is_available", "mem_get_info", "get_device_capability", "get_device_properties"),
    *("get_cpu_capability", "get_capabilities", "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"),
    *("_is_avx512_bf16_supported", "varlen"),
}


def test_hardware_is_asked_in_one_file():
    for path in (ROOT / "rd_torch").rglob("*.py"):
        nodes = [] if path.name == "hardware.py" else list(ast.walk(ast.parse(path.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not names & ASKED, path
