"""`TransformersBackbone`: any encoder that transformers loads, as a level of a chain.

This is the door for models that are not here natively. transformers is imported when a model is loaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from rd_torch.backbone.backbone import Backbone
from rd_torch.backbone.layer import AttentionSink
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import at_least_float32
from rd_torch.backbone.tokenizers import TokenizerAlphabet
from rd_torch.levels import TRANSFORMERS_FAMILY, Reference
from rd_torch.modules import StateDict


class TransformersBackbone(Backbone):
    r"""Any encoder of transformers' that gives one hidden state for each token.

    Tokens are made by the model's own tokenizer, and special tokens are those that it names. The model always
    gets the mask of what is no padding. Batches are padded, not packed, so that a family which is here
    natively runs faster: ESM-2, ESM-C.

    Args:
        model: a model of transformers' that answers with `last_hidden_state`.
        tokenizer: its tokenizer.
        layer: number of the hidden layer to take, 0 for the embeddings of tokens; by default the last hidden
            state, after whatever the model does to it.

    Raises:
        ValueError: for a layer that the model does not have, or a tokenizer that cannot be used.

    Examples:
        >>> from transformers import BertConfig, BertModel, BertTokenizerFast
        >>> _ = pathlib.Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
        ...     *"LAGVSERTIDPKQNFYMHWCXBUZO"]))
        >>> config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     intermediate_size=64)
        >>> tokenizer = BertTokenizerFast("vocab.txt", do_lower_case=False)
        >>> backbone = rd_torch.TransformersBackbone(BertModel(config), tokenizer)
        >>> rd_torch.embed(rd_torch.RDModel({"tiny": backbone}, []), ["MQIFVK"]).shape
        (1, 32)
    """

    family = TRANSFORMERS_FAMILY
    alphabet: TokenizerAlphabet

    def __init__(self, model: nn.Module, tokenizer: Any, layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.alphabet = TokenizerAlphabet(tokenizer)
        config: Any = model.config
        self.embed_dim = config.hidden_size
        self.num_layers = config.num_hidden_layers
        self.attention_heads = config.num_attention_heads
        if layer is not None and not 0 <= layer <= self.num_layers:
            raise ValueError(f"expected a layer from 0 to {self.num_layers}, got {layer}")
        self.layer = layer
        self.facts = {} if layer is None else {"layer": layer}
        self._checkpointing = False

    @classmethod
    def from_pretrained(  # noqa: PLR0913  # mirrors transformers' own
        cls,
        name_or_folder: str | Path,
        *,
        layer: int | None = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model and its tokenizer from a folder or from the Hub.

        Args:
            name_or_folder: the folder, or the Hub id.
            layer: number of the hidden layer to take; by default the last hidden state.
            trust_remote_code: whether Python code that lies beside the weights may run. Some models cannot be
                loaded without; read the code first.
            dtype: dtype of the weights, or `"auto"` for the stored one; by default float32.
            device: device to put the model on; by default the CPU.
            revision: commit, tag or branch of a Hub id.
            cache_dir: folder of the Hub's cache; by default the Hub's own.
            local_files_only: whether to take files from the cache alone, without the network.

        Returns:
            The backbone in `eval` mode.

        Raises:
            FileNotFoundError: if nothing is there.
            ValueError: for files that would run code of their own, that leave weights of the encoder out, or
                that transformers cannot read.
            ModuleNotFoundError: where transformers is not installed.
        """
        name = str(name_or_folder)
        options = {
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        model, tokenizer = _load(name, options)
        if dtype == "auto":
            stored = getattr(model.config, "dtype", None) or getattr(model.config, "torch_dtype", None)
            dtype = stored if isinstance(stored, torch.dtype) else torch.float32
        backbone = cls(model.to(device=device, dtype=dtype), tokenizer, layer)
        commit = getattr(model.config, "_commit_hash", None)
        if commit is not None and not Path(name).exists():
            backbone.reference = Reference(name, commit)
        return backbone.eval()

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer to a folder, as transformers does, in place of an older one."""
        model: Any = self.model
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not over the old files, from which the tensors may be mapped.
        with TemporaryDirectory(dir=folder.parent) as new:
            model.save_pretrained(new)
            self.alphabet.tokenizer.save_pretrained(new)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(new, folder)

    def forward(self, tokens: Tensor, packing: Packing, sink: AttentionSink | None = None) -> Tensor:
        """Compute the hidden states of the real tokens; see `Backbone.forward`.

        Raises:
            ValueError: for distributions in place of ids, more tokens than the model has positions for, or a
                model that does not give one hidden state for each token.
        """
        if tokens.is_floating_point():
            raise ValueError(
                f"expected token ids, got distributions, which {type(self.model).__name__} does not take"
            )
        self._require_positions(tokens.shape[1])
        out = self.model(
            input_ids=tokens,
            attention_mask=packing.real.long(),
            output_hidden_states=self.layer is not None,
            output_attentions=sink is not None,
            return_dict=True,
        )
        hidden = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        if hidden.shape[:2] != tokens.shape:
            raise ValueError(
                f"expected one hidden state for each of {tuple(tokens.shape)} tokens, got "
                f"{tuple(hidden.shape[:2])} from {type(self.model).__name__}"
            )
        if sink is not None:
            _pass_on(out.attentions, packing.real, sink)
        return packing.pack(hidden).to(at_least_float32(hidden.dtype))

    def _require_positions(self, time: int) -> None:
        """Raise a ValueError for more tokens than the model has learned positions for."""
        for name, part in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
                most = part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
                if time > most:
                    raise ValueError(
                        f"expected at most {most:,} tokens, for which {type(self.model).__name__} has "
                        f"positions, got {time:,}: cut sequences (--max-length), or embed them in pieces "
                        "(--windows)"
                    )

    def freeze_heads(self) -> None:
        """Stop poolers from training, which no hidden state depends on."""
        for name, parameter in self.named_parameters():
            if "pooler" in name:
                parameter.requires_grad_(False)

    def embedding_tensors(self) -> StateDict:
        """Return the tensors that embeddings depend on, by name: all but those of poolers."""
        return StateDict(self, lambda name: "pooler" not in name)

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass computes layers again."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        model: Any = self.model
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpointing:
            model.gradient_checkpointing_disable()
        self._checkpointing = on


def _pass_on(attentions: tuple[Tensor, ...] | None, real: Tensor, sink: AttentionSink) -> None:
    """Give the attention maps of each layer to a function, with zeros at padding."""
    if not attentions or attentions[0] is None:
        raise ValueError(
            "expected a model that returns attention maps, got one that does not: load it with "
            'attn_implementation="eager"'
        )
    both = (real[:, None, :, None] & real[:, None, None, :]).to(attentions[0].dtype)
    for maps in attentions:
        sink(maps * both)


def _load(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model and its tokenizer by transformers; say in one sentence why that is not possible."""
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ModuleNotFoundError(f"expected the package transformers, got none: {error}") from error
    try:
        config = AutoConfig.from_pretrained(name, **options)
        model, found = _class_for(config).from_pretrained(name, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _explained(name, error) from error
    missing = [key for key in found["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(
            f"expected a file with every weight of {type(model).__name__}, got {name} without "
            f"{missing[0]} ({len(missing)} in all), which would be random numbers"
        )
    is_whole = getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder")
    return (model.get_encoder() if is_whole else model), tokenizer


def _class_for(config: Any) -> Any:
    """Return the class of transformers' that loads a model's encoder."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _explained(name: str, error: Exception) -> Exception:
    """Return the error to raise for a model that transformers does not load."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ValueError(
            f"expected a model whose code is transformers' own, got {name}, whose files bring Python code: "
            "none of it was run; read it and, if you trust it, load it by rd_torch.TransformersBackbone."
            f"from_pretrained({name!r}, trust_remote_code=True), or name it with --trust-remote-code"
        )
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(
        f"expected a model and a tokenizer that transformers loads, got {name}: {text.splitlines()[0]}"
    )
