"""A chain as one file that runs without this package: ONNX, or a compiled package of PyTorch's.

What cannot be written is refused before anything is computed. What has been written is run before it takes
its name: on batches of unequal lengths it has to give the model's own embeddings.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone import PROBES, is_real, is_residue, obstacle, tokenize
from rd_torch.config import ALPHABET
from rd_torch.disk import move
from rd_torch.model import RDModel
from rd_torch.placement import is_plain
from rd_torch.training import evaluating

TOLERANCE: Final = 1e-4
"""How far a file's embedding may be from the model's, in standard deviations of the model's features."""

OLDEST_EXPORTER: Final = (2, 8)
"""The oldest PyTorch that leaves batch and time open without being told their largest values."""

OPEN: Final = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
"""What a file leaves open."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        packages: what has to be installed.
        devices: kinds of device that a model may be on.
        write: writes an encoder to a path, with facts beside it.
        load: reads it back as a function of token ids.
    """

    packages: tuple[str, ...]
    devices: tuple[str, ...]
    write: Callable[[_Encoder, Path, Mapping[str, str]], None]
    load: Callable[[Path], Run]


def export(model: RDModel, path: str | Path) -> None:
    """Writes a chain as one file that runs without this package, for any number of proteins of any length.

    | its name ends in | what runs it |
    |---|---|
    | `.onnx` | onnxruntime and other runtimes, without PyTorch |
    | `.pt2` | `torch._inductor.aoti_load_package` in Python, or libtorch in C++ |

    It takes `tokens`, `(batch, time)` int64 ids, and gives `embeddings`, `(batch, time, width)` float32 with
    zeros at padding, and `residue_mask`, `(batch, time)`, True at residues. Its metadata say what stands at
    each id (`rd_torch.tokens`), the ids of `<cls>`, `<pad>`, `<eos>`, `<unk>` and `<mask>`
    (`rd_torch.special`), the widths at which prefixes end (`rd_torch.levels`), all as JSON, and the model's
    fingerprint (`rd_torch.fingerprint`). A `.pt2` is compiled for CPUs with this one's vector units, or for
    the kind of GPU that the model is on. Weights of more than 1.8 GB lie beside an `.onnx` in `.onnx.data`.

    Args:
        model: a chain in float32, as it was loaded.
        path: the file; one of that name is replaced.

    Raises:
        ValueError: for another ending, or a chain that cannot be written: in half precision, on another kind
            of device, offloaded, quantised, or with adapters or hooks in it.
        TypeError: for anything but an `RDModel`, such as a `Predictor` around one.
        ImportError: where a package is missing, or PyTorch is older than 2.8.
        OSError: where there is no C++ compiler for `.pt2`, or no folder for the file.
        RuntimeError: where the file does not give the model's embeddings; it is not kept.
    """
    if not isinstance(model, RDModel):
        raise TypeError(f"expected an RDModel to export, got {type(model).__name__}: export the chain in it")
    path = Path(path)
    form = format_of(path)
    _require_exportable(model, form)
    with evaluating(model), torch.no_grad(), TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        part = Path(folder) / path.name
        with _quietly():
            form.write(_Encoder(model).eval(), part, _facts_of(model))
        _require_equal(form.load(part), model)
        for written in sorted(part.parent.iterdir(), key=lambda each: each == part):  # the file itself last
            move(written, path.parent / written.name, durable=False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps exporters from speaking of their own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def format_of(path: Path) -> Format:
    """What writes files of this name, and has all that it needs; errors are those of `export`."""
    if path.suffix not in FORMATS:
        raise ValueError(f"expected a file name that ends in {' or '.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for {path}, got none at {path.parent}")
    if hardware.is_older(torch.__version__, OLDEST_EXPORTER):
        oldest = ".".join(map(str, OLDEST_EXPORTER))
        raise ImportError(f"expected torch {oldest} or newer to export, got torch {torch.__version__}")
    form = FORMATS[path.suffix]
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"expected the packages {', '.join(form.packages)} to write {path.suffix}, got no "
            f"{', '.join(missing)}: pip install rd_torch[export]"
        )
    if path.suffix == ".pt2" and not hardware.has_compiler("C++"):
        raise OSError("expected a C++ compiler to write .pt2, got none: install g++, or name one by CXX")
    return form


def _require_exportable(model: RDModel, form: Format) -> None:
    """Raises a ValueError for a model that a file would not be the same as."""
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"expected a chain in float32 to export, got {dtype}: convert it by model.float()")
    if model.device.type not in form.devices:
        raise ValueError(
            f"expected a chain on {' or '.join(form.devices)} to export, got {model.device}: move it with .to"
        )
    reason = obstacle(model.family()) or _hidden(model)
    if reason is not None:
        raise ValueError(
            f"expected a chain that the exporter can follow, got one in which {reason}: merge adapters "
            "(merge_and_unload), remove hooks, and export before you quantise or offload"
        )


def _hidden(model: RDModel) -> str | None:
    """Which parameter has no plain numbers; None where all have."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} is kept elsewhere"
        if not is_plain(parameter):
            return f"{name} is quantised or sharded"
    return None


class _Encoder(nn.Module):
    """What is traced: token ids to embeddings and the residue mask."""

    def __init__(self, model: RDModel) -> None:
        super().__init__()
        self.model = model

    @property
    def example(self) -> Tensor:
        """A batch to trace with."""
        return tokenize(PROBES[0]).to(self.model.device)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, time)` to `(batch, time, width)` and `(batch, time)`."""
        return self.model.encode(tokens), is_residue(tokens)


def _facts_of(model: RDModel) -> dict[str, str]:
    """What whoever runs the file has to know."""
    widths = model.config.widths
    if model.config.method == "naive":  # whose narrower levels are no prefixes
        *_, last = widths.items()
        widths = dict([last])
    special = {name: ALPHABET.get_idx(name) for name in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")}
    facts = {"tokens": ALPHABET.all_toks, "levels": widths, "special": special}
    return {f"rd_torch.{name}": json.dumps(fact) for name, fact in facts.items()} | {
        "rd_torch.fingerprint": model.fingerprint()
    }


def _require_equal(run: Run, model: RDModel) -> None:
    """Raises a RuntimeError unless the file gives the model's embeddings."""
    for tokens in _probes(model.device):
        expected = model.encode(tokens)
        got, mask = run(tokens)
        real = expected[is_real(tokens)]
        error = float((got - expected).abs().max() / real.std()) if got.shape == expected.shape else torch.inf
        if not (error <= TOLERANCE and torch.equal(mask, is_residue(tokens))):
            raise RuntimeError(
                f"expected a file within {TOLERANCE:g} standard deviations of the model's embeddings, got "
                f"one that is off by {error:.2g} for a batch of {len(tokens)}; it was not kept. Please "
                "report it with what rd-torch env prints"
            )


def _probes(device: torch.device) -> Iterator[Tensor]:
    """Batches of unequal lengths, one with masks in it, and a protein alone."""
    for probe in (*PROBES, PROBES[0][:1]):
        yield tokenize(probe).to(device)
    tokens = tokenize(PROBES[1]).to(device)
    masked = is_residue(tokens) & (torch.arange(tokens.shape[1], device=device) % 5 == 2)
    yield tokens.masked_fill(masked, ALPHABET.mask_idx)


def _write_onnx(encoder: _Encoder, path: Path, facts: Mapping[str, str]) -> None:
    written = torch.onnx.export(
        encoder,
        (encoder.example,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=OPEN,
        input_names=["tokens"],
        output_names=["embeddings", "residue_mask"],
    )
    assert written is not None
    written.model.metadata_props.update(facts)
    written.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, time)` to `(batch, time, width)` and `(batch, time)`."""
        embeddings, mask = session.run(None, {"tokens": tokens.numpy()})
        return torch.from_numpy(embeddings), torch.from_numpy(mask)

    return run


def _write_compiled(encoder: _Encoder, path: Path, facts: Mapping[str, str]) -> None:
    program = torch.export.export(encoder, (encoder.example,), dynamic_shapes=OPEN)
    options = {"aot_inductor.metadata": dict(facts)}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _load_compiled(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


FORMATS: Final = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), ("cpu",), _write_onnx, _load_onnx),
    ".pt2": Format((), ("cpu", "cuda"), _write_compiled, _load_compiled),
}
"""By what names end in."""
