"""`TransformersBackbone`: any encoder that transformers loads, as a level of a chain.

This is the door for models that are not here natively. transformers is imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor, nn

from rd_torch.backbone.autoload import is_loaded_again, load, save
from rd_torch.backbone.backbone import Backbone, Taken, TooManyTokensError
from rd_torch.backbone.layer import AttentionSink
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import at_least_float32, sparing
from rd_torch.backbone.tokenizers import TokenizerAlphabet
from rd_torch.backbone.trying import count_positions, find_idle, giving_maps, pass_on
from rd_torch.levels import TRANSFORMERS_FAMILY
from rd_torch.modules import StateDict

LAYERS: Final = ("num_hidden_layers", "n_layer")
"""What configs call the number of layers."""


class TransformersBackbone(Backbone):
    r"""Any encoder of transformers' that gives one hidden state for each token.

    Tokens are made by the model's own tokenizer, and special tokens are those that it names. The model always
    gets the mask of what is no padding. Batches are padded, not packed, so that a family which is here
    natively runs faster: ESM-2, ESM-C.

    The model is tried on two short sequences. Parameters that its hidden states do not depend on, such as a
    pooler's, are frozen in a chain, and are no part of its fingerprint.

    Args:
        model: a model of transformers' that answers with `last_hidden_state`.
        tokenizer: its tokenizer.

    Raises:
        ValueError: for a tokenizer that cannot be used or does not belong to the model, and a model that does
            not give one hidden state for each token, numbers that
            are not finite, or other numbers where a sequence is padded.

    Examples:
        >>> from pathlib import Path
        >>> from transformers import BertConfig, BertModel, BertTokenizerFast
        >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVSERTIDPKQNFYMHWCXBUZO"]
        >>> _ = Path("vocab.txt").write_text("\n".join(tokens))
        >>> tokenizer = BertTokenizerFast("vocab.txt", do_lower_case=False)
        >>> config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> backbone = rd_torch.TransformersBackbone(BertModel(config), tokenizer)
        >>> rd_torch.embed(rd_torch.RDModel({"tiny": backbone}, []), ["MQIFVK"]).shape
        (1, 32)
    """

    family = TRANSFORMERS_FAMILY
    alphabet: TokenizerAlphabet

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.alphabet = TokenizerAlphabet(tokenizer)
        self.embed_dim = self._read_number("hidden_size", "d_model")
        self.num_layers = self._read_number(*LAYERS)
        # Models that mix tokens in another way, such as Mamba, have no attention heads.
        self.attention_heads = self._read_number("num_attention_heads", otherwise=0)
        self._depth = self.num_layers
        self.facts = {"tokenizer": self.alphabet.digest}
        self._checkpointing = False
        self._most_tokens = count_positions(model)
        self._idle = find_idle(self.model, self.alphabet, self.embed_dim, self._run)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
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
            ValueError: for files that would run code of their own, that leave weights out, or that
                transformers cannot load; and as the class itself.
            ModuleNotFoundError: where transformers is not installed.
        """
        name = str(name_or_folder)
        loaded = load(
            name,
            trusted=trust_remote_code,
            dtype=None if dtype == "auto" else dtype,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        try:
            backbone = cls(loaded.model.to(device), loaded.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error}, in {name}") from error
        missing = sorted(key for key in loaded.missing if key not in backbone._idle)
        if missing:
            raise ValueError(
                f"expected a file with every weight of {backbone._name}, got {name} without {missing[0]} "
                f"({len(missing)} in all), which would be random numbers"
            )
        backbone.reference = loaded.reference
        return backbone.eval()

    def require_whole(self) -> None:
        """Require that transformers would load the model's files as what it is, before they are written.

        Raises:
            ValueError: for a model that is a part of another, that holds adapters, or of a class that
                transformers does not know.
        """
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"expected a model without adapters, which are written alone, got {self._name} with some: "
                "merge them by peft's merge_and_unload, and save what that gives"
            )
        if not is_loaded_again(self.model):
            raise ValueError(
                f"expected a model that transformers loads by itself, got {self._name}: it is a part of "
                "another, or its code is not among its files"
            )

    @property
    def runs_code_of_files(self) -> bool:
        """Whether the model's code came with its files."""
        return type(self.model).__module__.startswith("transformers_modules")

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer to a folder, as transformers does, in place of an older one.

        Args:
            folder: the folder.
        """
        save(self.model, self.alphabet.tokenizer, folder)

    @property
    def depth(self) -> int:
        """Number of the last layer that is taken. The model runs as a whole, whichever that is."""
        return self._depth

    def _cut(self, layer: int) -> Self:
        """Return a backbone of the same model whose last hidden state is that of a layer."""
        cut = type(self)(self.model, self.alphabet.tokenizer)
        cut._depth, cut.reference, cut.training = layer, self.reference, self.training
        cut._checkpointing = self._checkpointing
        cut._idle = find_idle(cut.model, cut.alphabet, cut.embed_dim, cut._run)
        return cut

    def forward(
        self,
        tokens: Tensor,
        packing: Packing,
        sink: AttentionSink | None = None,
        *,
        taken: Taken | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute the hidden states of the real tokens; see `Backbone.forward` and `Encoder.forward`.

        Those of other layers than the last are as transformers gives them, with whatever norms it applies.

        Raises:
            TooManyTokensError: for a sequence with more tokens than the model has positions for.
            ValueError: for distributions in place of ids, or attention maps of a model that does not return
                them.
        """
        if tokens.is_floating_point():
            raise ValueError(f"expected token ids, got distributions, which {self._name} does not take")
        layers = (self.depth,) if taken is None else taken.layers
        if packing.index is not None and not packing.longest:
            nothing = torch.zeros(0, self.embed_dim, dtype=at_least_float32(self.dtype), device=tokens.device)
            return nothing if taken is None else (nothing,) * len(layers)
        if self._most_tokens is not None and tokens.shape[1] > self._most_tokens:
            raise TooManyTokensError(
                f"expected at most {self._most_tokens:,} tokens, for which {self._name} has positions, got "
                f"{tokens.shape[1]:,}: take shorter sequences; rd-torch embed cuts them by --max-length, and "
                "embeds them in pieces by --windows"
            )
        states = tuple(
            packing.pack(hidden).to(at_least_float32(hidden.dtype))
            for hidden in self._run_layers(tokens, packing.real, sink, layers)
        )
        return states[0] if taken is None else states

    def _run(self, tokens: Tensor, real: Tensor, sink: AttentionSink | None = None) -> Tensor:
        """Return `(batch, time, width)` hidden states of the last layer that is taken."""
        return self._run_layers(tokens, real, sink, (self.depth,))[0]

    def _run_layers(
        self, tokens: Tensor, real: Tensor, sink: AttentionSink | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Return `(batch, time, width)` hidden states, with anything at padding; pass attention maps on."""
        options = {} if list(layers) == [self.num_layers] else {"output_hidden_states": True}
        if sink is None:
            out = self.model(input_ids=tokens.long(), attention_mask=real.long(), return_dict=True, **options)
        else:
            options["output_attentions"] = True
            with giving_maps(self.model):
                out = self.model(
                    input_ids=tokens.long(), attention_mask=real.long(), return_dict=True, **options
                )
            pass_on(out.attentions, real, sink)
        last = self.num_layers
        return [out.last_hidden_state if layer == last else out.hidden_states[layer] for layer in layers]

    def _read_number(self, *names: str, otherwise: int | None = None) -> int:
        """Return the number that the model's config has by one of the names."""
        config = getattr(self.model, "config", None)
        found = next((each for name in names if (each := getattr(config, name, None)) is not None), otherwise)
        if not isinstance(found, int):
            raise ValueError(
                f"expected a model whose config states {names[0]} as a number, got {found!r} in {self._name}"
            )
        return found

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the model; angles, and what transformers keeps in float32, never become half."""
        with sparing(self.model, fn):
            super()._apply(fn, recurse)
        return self

    def bytes_beyond(self, time: int) -> int:
        """Count four attention maps in float32, a wide feed-forward block, and all layers' hidden states.

        Args:
            time: number of tokens in the longest sequence of the batch.

        Returns:
            The number of bytes for each token.
        """
        config, element, layers = self.model.config, self.dtype.itemsize, self.num_layers
        inner = max(int(getattr(config, name, None) or 0) for name in ("intermediate_size", "d_ff"))
        kept = 0 if self.depth == layers else (layers + 1) * self.embed_dim
        return 16 * self.attention_heads * time + element * (4 * inner + kept)

    def freeze_heads(self) -> None:
        """Stop parameters from training that no hidden state depends on."""
        for name, parameter in self.named_parameters():
            if name.removeprefix("model.") in self._idle:
                parameter.requires_grad_(False)

    def embedding_tensors(self) -> StateDict:
        """Return the tensors that embeddings depend on, by name."""
        return StateDict(self, lambda name: name.removeprefix("model.") not in self._idle)

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass computes layers again."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        """Let the backward pass compute layers again, or not."""
        # transformers has renamed its methods, and warns of the old ones.
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(self.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        elif self._checkpointing:
            getattr(self.model, f"{kind}_checkpointing_disable")()
        self._checkpointing = on
