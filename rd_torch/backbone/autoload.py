"""Load a model and its tokenizer by transformers, and run no code from files unless that is asked for."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from rd_torch import hardware
from rd_torch.disk import move, part_folder
from rd_torch.levels import Reference

INSTALL: Final = "pip install transformers"


class Loaded(NamedTuple):
    """What transformers has loaded.

    Attributes:
        model: the encoder.
        tokenizer: its tokenizer.
        missing: names of the model's tensors that the files do not have, which are random numbers.
        reference: where on the Hub the files lie; None for a folder.
    """

    model: Any
    tokenizer: Any
    missing: frozenset[str]
    reference: Reference | None


def load(
    name: str, *, trusted: bool, dtype: torch.dtype | None, revision: str | None, **where: Any
) -> Loaded:
    """Load an encoder and its tokenizer.

    Args:
        name: the folder, or the Hub id.
        trusted: whether Python code that lies beside the weights may run.
        dtype: dtype of the weights; None for the stored one.
        revision: commit, tag or branch of a Hub id.
        **where: `cache_dir` and `local_files_only`, as transformers takes them.

    Returns:
        What was loaded, all of one commit.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for files that would run code, or that transformers cannot load.
        ModuleNotFoundError: where transformers is not installed.
    """  # noqa: DOC501  # out of memory is let pass
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ModuleNotFoundError(
            f"expected the package transformers, got none: {INSTALL} ({error})"
        ) from error
    options = {**where, "revision": revision, "trust_remote_code": trusted}
    try:
        with _quiet():
            reference = _find_commit(name, options)
            options["revision"] = reference.revision if reference else None
            if not trusted:
                _require_no_code(name, options)
            config = AutoConfig.from_pretrained(name, **options)
            kind = _class_for(config)
            model, found = kind.from_pretrained(
                name, output_loading_info=True, **_dtype_option(config, dtype), **options
            )
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (_CodeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, and the code of models, fail in ways of their own
        raise _explained(name, error) from error
    if hasattr(model, "decoder") and getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"expected an encoder, got {type(model).__name__} in {name}, of which transformers does not load "
            "the encoder alone, as it does of T5"
        )
    return Loaded(model, tokenizer, frozenset(found["missing_keys"]), reference)


class _CodeError(ValueError):
    """The error for files that would run code."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what transformers reports of weights that are left over, such as those of heads."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _find_commit(name: str, options: dict[str, Any]) -> Reference | None:
    """Return where on the Hub the files lie, at the commit that a revision means now; None for a folder."""
    from transformers.utils import cached_file

    if Path(name).exists():
        return None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError("it is neither a folder nor a Hub id")
    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    found = cached_file(name, "config.json", **options)
    return None if found is None else Reference(name, Path(found).parent.name)


def _require_no_code(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a model or a tokenizer whose config names code to run.

    transformers would ask at a terminal, or take a class of its own, which may compute something else.

    Raises:
        _CodeError: for such a model.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    config, _ = PretrainedConfig.get_config_dict(name, **options)
    kernel = str(config.get("attn_implementation") or "")
    if "auto_map" in config or "/" in kernel or "auto_map" in get_tokenizer_config(name, **options):
        raise _CodeError(
            f"expected a model whose code is transformers' own, got {name}, whose files bring Python code, "
            "none of which was run: read it and, if you trust it, allow it by trust_remote_code="
            f"[{name!r}] in RDModel.from_pretrained, trust_remote_code=True in TransformersBackbone."
            f"from_pretrained, or --trust-remote-code {name} on the command line"
        )


def _class_for(config: Any) -> Any:
    """Return the class of transformers' that loads a model's encoder."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def is_loaded_again(model: Any) -> bool:
    """Return whether files of a model are loaded as this class again, and not as another."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING):
        if type(model.config) in mapping:
            known = mapping[type(model.config)]
            return type(model) in (known if isinstance(known, tuple) else (known,))
    return "AutoModel" in getattr(model.config, "auto_map", {})


def _dtype_option(config: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the dtype of weights under the name that this version of transformers has for the option."""
    import transformers

    is_old = hardware.is_older(transformers.__version__, (4, 56))
    stored = getattr(config, "torch_dtype" if is_old else "dtype", None)
    return {"torch_dtype" if is_old else "dtype": dtype or stored or torch.float32}


def _explained(name: str, error: Exception) -> Exception:
    """Return the error to raise for a model that transformers does not load."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if re.search("tiktoken|sentencepiece", str(error), re.I) and find_spec("sentencepiece") is None:
        text = "its tokenizer, as ProtT5's, needs a package: pip install sentencepiece protobuf"
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(f"expected a model and a tokenizer that transformers loads, got {name}: {text}")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer to a folder, in place of an older one.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: the folder.
    """
    part = part_folder(folder)  # not over the old files, from which the tensors may be mapped
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in part.rglob("*.safetensors"):  # safetensors lets the owner alone read its files
        path.chmod(part.stat().st_mode & 0o666)
    shutil.rmtree(folder, ignore_errors=True)
    move(part, folder, durable=False)
