"""Write a chain as one file that runs without this package: ONNX, or a compiled package of PyTorch's.

A chain that cannot be written is refused before anything is computed. A file that has been written is run
before it takes its name: on batches of unequal lengths it has to give the model's own embeddings.
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
from rd_torch.disk import move
from rd_torch.model import RDModel
from rd_torch.modules import evaluating, is_plain

TOLERANCE: Final = 1e-4
"""Largest difference of a file's embeddings from the model's, in standard deviations of the model's."""

OLDEST_EXPORTER: Final = (2, 8)
"""The oldest PyTorch that exports open dimensions without being told their largest values."""

OPEN: Final = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
"""The dimensions whose size a file leaves open."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A file that is loaded: token ids to embeddings and residue mask."""


class MismatchError(RuntimeError):
    """A file does not give the model's embeddings."""


class Exporter(NamedTuple):
    """How one kind of file is written and loaded.

    Attributes:
        packages: packages that have to be installed.
        devices: types of device that the model may be on.
        write: writes an encoder to a path, with facts in its metadata.
        load: loads the file.
    """

    packages: tuple[str, ...]
    devices: tuple[str, ...]
    write: Callable[[_Encoder, Path, Mapping[str, str]], None]
    load: Callable[[Path], Run]


def export(model: RDModel, path: str | Path) -> None:
    """Write a chain as one file that runs without this package, for any number of proteins of any length.

    | the name ends in | the file is run by |
    |---|---|
    | `.onnx` | onnxruntime and other runtimes, without PyTorch |
    | `.pt2` | `torch._inductor.aoti_load_package` in Python, or libtorch in C++ |

    The file takes `tokens`, `(batch, time)` int64 ids, and returns `embeddings`, `(batch, time, width)`
    float32 with zeros at padding, and `residue_mask`, `(batch, time)`, True at residues. Its metadata has, as
    JSON, the token of each id (`rd_torch.tokens`), the ids of `<cls>`, `<pad>`, `<eos>`, `<unk>` and `<mask>`
    (`rd_torch.special`), and the width of each level (`rd_torch.levels`); and the model's fingerprint
    (`rd_torch.fingerprint`). A `.pt2` is compiled for CPUs that have the vector units of this one, or for the
    kind of GPU that the model is on. Where an `.onnx` has more than 1.8 GB of weights, they lie in a file
    beside it, `.onnx.data`.

    Args:
        model: a chain in float32, as it was loaded.
        path: the file; a file of that name is replaced.

    Raises:
        ValueError: for another ending, or a chain that cannot be written: in half precision, on another type
            of device, offloaded, quantised, or with adapters or hooks in it.
        TypeError: for anything but an `RDModel`, such as a `Predictor` around one.
        ImportError: where a package is missing, or PyTorch is older than 2.8.
        OSError: where there is no C++ compiler for `.pt2`, or no folder for the file.
        MismatchError: a RuntimeError; where the file does not give the model's embeddings; it is not kept.

    Examples:
        >>> chain = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="28K")
        >>> rd_torch.export(chain, "model.onnx")
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession("model.onnx")
        >>> embeddings, mask = session.run(None, {"tokens": torch.tensor([[0, 20, 15, 7, 2]]).numpy()})
        >>> embeddings.shape, mask.tolist()
        ((1, 5, 32), [[False, True, True, True, False]])
    """
    if not isinstance(model, RDModel):
        raise TypeError(f"expected an RDModel to export, got {type(model).__name__}: export the chain in it")
    path = Path(path)
    exporter = exporter_for(path)
    _require_exportable(model, exporter)
    with evaluating(model), torch.no_grad(), TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        part = Path(folder) / path.name
        with _silence_exporters():
            exporter.write(_Encoder(model).eval(), part, _facts_of(model))
        _require_equal(exporter.load(part), model)
        # The file itself comes last: whoever sees it finds its weights beside it.
        for written in sorted(part.parent.iterdir(), key=lambda each: each == part):
            move(written, path.parent / written.name, durable=False)


@contextmanager
def _silence_exporters() -> Iterator[None]:
    """Hide the warnings and messages of exporters, which concern their own code and not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def exporter_for(path: Path) -> Exporter:
    """Return what writes files of this name, if all that it needs is there; raise as `export` does if not."""
    if path.suffix not in EXPORTERS:
        raise ValueError(f"expected a file name that ends in {' or '.join(EXPORTERS)}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for {path}, got none at {path.parent}")
    if hardware.is_older(torch.__version__, OLDEST_EXPORTER):
        oldest = ".".join(map(str, OLDEST_EXPORTER))
        raise ImportError(f"expected torch {oldest} or newer to export, got torch {torch.__version__}")
    exporter = EXPORTERS[path.suffix]
    missing = [package for package in exporter.packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"expected the packages {', '.join(exporter.packages)} to write {path.suffix}, got no "
            f"{', '.join(missing)}: pip install rd_torch[export]"
        )
    if path.suffix == ".pt2" and not hardware.has_compiler("C++"):
        raise OSError("expected a C++ compiler to write .pt2, got none: install g++, or name one by CXX")
    return exporter


def _require_exportable(model: RDModel, exporter: Exporter) -> None:
    """Raise a ValueError for a model that would not be the same in a file."""
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"expected a chain in float32 to export, got {dtype}: convert it by model.float()")
    if model.device.type not in exporter.devices:
        raise ValueError(
            f"expected a chain on {' or '.join(exporter.devices)} to export, got {model.device}: "
            "move it with .to"
        )
    reason = obstacle(model.family()) or _missing_numbers(model)
    if reason is not None:
        raise ValueError(
            f"expected a chain that the exporter can follow, got one in which {reason}: merge adapters "
            "(merge_and_unload), remove hooks, and export before you quantise or offload"
        )


def _missing_numbers(model: RDModel) -> str | None:
    """Say which parameter is no plain tensor with numbers; return None where all are."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} is kept elsewhere"
        if not is_plain(parameter):
            return f"{name} is quantised or sharded"
    return None


class _Encoder(nn.Module):
    """The module that is traced: it maps token ids to embeddings and the residue mask."""

    def __init__(self, model: RDModel) -> None:
        super().__init__()
        self.model = model

    @property
    def example(self) -> Tensor:
        """A batch of token ids to trace with."""
        return tokenize(PROBES[0], self.model.alphabet).to(self.model.device)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(batch, time)` to `(batch, time, width)` and `(batch, time)`."""
        return self.model.encode(tokens), is_residue(tokens, self.model.alphabet)


def _facts_of(model: RDModel) -> dict[str, str]:
    """Return the facts that a program which runs the file has to know, as its metadata has them."""
    widths = model.config.prefixes(model.embed_dim)
    alphabet = model.alphabet
    special = {name: alphabet.get_idx(name) for name in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")}
    facts = {"tokens": alphabet.all_toks, "levels": widths, "special": special}
    return {f"rd_torch.{name}": json.dumps(fact) for name, fact in facts.items()} | {
        "rd_torch.fingerprint": model.fingerprint()
    }


def _require_equal(run: Run, model: RDModel) -> None:
    """Raise a MismatchError unless the file gives the model's embeddings."""
    for tokens in _probes(model):
        expected = model.encode(tokens)
        got, mask = run(tokens)
        real = expected[is_real(tokens, model.alphabet)]
        error = float((got - expected).abs().max() / real.std()) if got.shape == expected.shape else torch.inf
        if not (error <= TOLERANCE and torch.equal(mask, is_residue(tokens, model.alphabet))):
            raise MismatchError(
                f"expected a file within {TOLERANCE:g} standard deviations of the model's embeddings, got "
                f"one that is off by {error:.2g} for a batch of {len(tokens)}; it was not kept. Please "
                "report it with what rd-torch env prints"
            )


def _probes(model: RDModel) -> Iterator[Tensor]:
    """Yield batches of unequal lengths, one of which has masks in it, and a protein alone."""
    alphabet, device = model.alphabet, model.device
    for probe in (*PROBES, PROBES[0][:1]):
        yield tokenize(probe, alphabet).to(device)
    tokens = tokenize(PROBES[1], alphabet).to(device)
    masked = is_residue(tokens, alphabet) & (torch.arange(tokens.shape[1], device=device) % 5 == 2)
    yield tokens.masked_fill(masked, alphabet.mask_idx)


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
        """Map `(batch, time)` to `(batch, time, width)` and `(batch, time)`."""
        embeddings, mask = session.run(None, {"tokens": tokens.numpy()})
        return torch.from_numpy(embeddings), torch.from_numpy(mask)

    return run


def _write_compiled(encoder: _Encoder, path: Path, facts: Mapping[str, str]) -> None:
    program = torch.export.export(encoder, (encoder.example,), dynamic_shapes=OPEN)
    options = {"aot_inductor.metadata": dict(facts)}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _load_compiled(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


EXPORTERS: Final = {
    ".onnx": Exporter(("onnx", "onnxscript", "onnxruntime"), ("cpu",), _write_onnx, _load_onnx),
    ".pt2": Exporter((), ("cpu", "cuda"), _write_compiled, _load_compiled),
}
"""Exporters by the suffix of the file."""
