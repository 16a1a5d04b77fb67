"""`RDModel`: all backbones and stages in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone import (
    AttentionSink,
    Packing,
    Prepared,
    check_tokens,
    is_real,
    is_residue,
    token_ids,
)
from rd_torch.chain import Chain
from rd_torch.choices import Storage
from rd_torch.config import ALPHABET
from rd_torch.loading import read_family, write_chain
from rd_torch.nesting import Nesting
from rd_torch.output import RDOutput
from rd_torch.stage import nest, stages_of
from rd_torch.weights import Hub, PublishedOptions, Source, Upload, read_checkpoint, upload


class RDModel(Chain):
    """A family of ESM-2 backbones and the stages that nest their embeddings.

    Every prefix of the embedding that ends at a level's width is, to the bit, the embedding of the
    chain that ends there (reverse distillation: Catrina et al., ICLR 2026, arXiv 2603.07710).

    Args:
        backbones: the family by level name, smallest first: `rd_torch.ESM2` modules or `esm.ESM2`
            objects, whose tensors are shared, not copied. Their language-model and contact heads
            are frozen; everything else stays as trainable as it is.
        stages: one stage fewer than backbones, as `solve_stages` returns them, or all `ConcatPCA`, the
            baseline; kept in float32 (in float64 where the backbones are).
        predict_from: what the stages' W acts on, the nested embedding or the previous raw one.
        special_rows: what stands at `<cls>`, `<eos>`, `<mask>` in the widest returned level: the
            rows of the maps, or the larger backbone's own (as the published implementation has it).
        provenance: where backbones and maps come from; saved with the model.

    Raises:
        ValueError: when stages and backbones do not fit together.
        TypeError: for a backbone of another kind.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> out = model(model.alphabet.get_batch_converter()([("a protein", "MKV")])[2])  # (1, 5, 128)
    """

    alphabet = ALPHABET
    alphabet_size = len(ALPHABET)
    padding_idx = ALPHABET.padding_idx
    mask_idx = ALPHABET.mask_idx
    cls_idx = ALPHABET.cls_idx
    eos_idx = ALPHABET.eos_idx
    prepend_bos = ALPHABET.prepend_bos
    append_eos = ALPHABET.append_eos

    _prepared: Prepared | None = None

    @classmethod
    def from_pretrained(  # noqa: PLR0913, PLR0917  # mirrors transformers' own
        cls,
        name_or_folder: str | Path,
        level: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backbones: Mapping[str, Source | nn.Module] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **published: Unpack[PublishedOptions],
    ) -> Self:
        """Loads a checkpoint in `eval` mode; of everything only what `level` needs.

        Args:
            name_or_folder: a checkpoint of ours: folder, Hub id, or `"esm2-rd-mini"`, which comes with
                the package; the authors' maps: `"singhlab/plm_reverse_distillation"` or a folder that
                holds their `weights/`; or one ESM-2: file, folder or Hub id.
            level: the level to end at; the authors' maps need one.
            dtype: the backbones' dtype, by default float32, or as our checkpoint stores it; the maps
                stay in float32 (float64 if that is asked).
            device: where the model goes.
            backbones: other backbones by level: file, folder, Hub id, `Reference` or module. A module
                is shared, unless it needs another dtype or device.
            revision: of the Hub id: commit, tag or branch.
            cache_dir: the Hub's cache, by default where `HF_HOME` has it.
            local_files_only: never ask the network.
            **published: which of the authors' maps, see `PublishedOptions`.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that is not there.
            ValueError: for a file that does not read, match or fit, a checksum that differs, or an
                unknown level or option.
        """
        hub = Hub(cache_dir, local_files_only)
        checkpoint = read_checkpoint(name_or_folder, level, hub, revision, **published)
        family = read_family(checkpoint, backbones or {}, hub, dtype, device)
        stages = stages_of(checkpoint.config, checkpoint.maps)
        return cls.of(checkpoint.config, family, list(stages.values())).to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        backbones: Storage = "included",
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        """Writes config, maps, model card and backbones to a folder that `from_pretrained` reads to the bit.

        Args:
            folder: made if need be.
            backbones: `"included"`, or `"referenced"`: Hub id, commit and checksums in place of the
                tensors, for backbones that are what came from there.
            cache_dir: the Hub's cache, where references are compared with.
            name: what the card calls the model, by default the folder.

        Raises:
            ValueError: for a reference to a backbone that came from elsewhere or was changed since, or a
                quantised one, whose weights are no plain tensors.
        """
        place = Path(folder)
        write_chain(self, place, backbones, Hub(cache_dir), name or place.resolve().name)

    def push_to_hub(
        self,
        repo: str,
        *,
        backbones: Storage = "included",
        cache_dir: str | Path | None = None,
        **options: Unpack[Upload],
    ) -> str:
        """Saves to a repository of the Hub, made if need be; returns the address of the commit.

        Args:
            repo: repository id, `"name/chain"`.
            backbones: as in `save_pretrained`.
            cache_dir: as in `save_pretrained`.
            **options: `private`, `token`, `revision` (a branch) and `commit_message`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, backbones=backbones, cache_dir=cache_dir, name=repo)
            return upload(Path(folder), repo, **options)

    def forward(
        self,
        tokens: Tensor,
        repr_layers: Iterable[int] | None = None,
        need_head_weights: bool = False,
        return_contacts: bool = False,
        *,
        width: int | None = None,
    ) -> RDOutput:
        """Nested embeddings of padded token ids.

        Args:
            tokens: `(batch, time)` integer ids of fair-esm's alphabet, `<pad>` id 1; or soft sequences:
                `(batch, time, 33)` distributions over the alphabet, padding 1 at `<pad>`, through which
                gradients reach the sequence. What is no embedding goes by each position's likeliest id.
            repr_layers: for code written for fair-esm: `[num_layers]` or nothing. Hidden layers
                have no reverse-distilled form.
            need_head_weights: return attention maps of the largest backbone that runs.
            return_contacts: return its contact probabilities, and the attention maps.
            width: features to return; backbones above the level that holds them do not run.

        Returns:
            An `RDOutput`; a batch without rows gives empty tensors.

        Raises:
            TypeError: for tokens that are neither integer nor floating.
            ValueError: for tokens of another rank or device, unknown ids, distributions that do not sum to
                one (within 0.005), a layer without a reverse-distilled form, or a width that does not exist.
        """
        layers = self._listed(repr_layers)
        maps: list[Tensor] = []
        sink = maps.append if need_head_weights or return_contacts else None
        packing, raw = self._run(tokens, width, sink)
        levels = self._nest(raw)
        *_, name = raw
        nested = packing.unpack(levels[name][:, :width])
        separate = {} if self.config.is_nested else levels
        largest = self.backbones[name]
        attentions = torch.stack(maps, 1) if maps else None
        ids = token_ids(tokens)
        return RDOutput(
            embeddings=self._with_special_rows(nested, ids, packing, raw[name]),
            logits=packing.unpack(largest.logits(raw[name])) if largest.has_lm_head else None,
            residue_mask=is_residue(ids),
            nested=nested,
            widths=tuple((name, self.config.widths[name]) for name in raw),
            num_layers=self.num_layers,
            separate={level: packing.unpack(part) for level, part in separate.items()},
            repr_layers=layers,
            attentions=attentions,
            contacts=largest.contact_head(ids, attentions) if return_contacts else None,
        )

    def encode(self, tokens: Tensor, *, width: int | None = None) -> Tensor:
        """The embeddings of `forward` alone, `(batch, time, width)`, without logits: for bulk work."""
        packing, raw = self._run(tokens, width)
        *_, name = raw
        nested = packing.unpack(self._nest(raw)[name][:, :width])
        return self._with_special_rows(nested, token_ids(tokens), packing, raw[name])

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Nested embeddings, `(..., nested width)`, from raw ones that people already hold; no backbone runs.

        Arguments, result and errors as for `Nesting.combine`.
        """
        return Nesting(self.config, self.stages).combine(embeddings)

    def predict_contacts(self, tokens: Tensor) -> Tensor:
        """Contact probabilities of the largest backbone, `(batch, residues, residues)`."""
        return self(tokens, return_contacts=True).contacts

    def prepare_inference(self) -> RDModel:
        """Makes inference fast on a CUDA device, for batches of any lengths; returns the model itself.

        From then on, in `eval` mode and without gradients, backbones run fused, small batches as CUDA
        graphs of a few packed sizes, smaller backbones beside the largest. A size takes longer when it
        first comes; nothing is compiled for it. Parameters stay shared and trainable; when they move
        or are replaced, what was derived from them is made again. On other devices the model is as fast
        as it gets, and is only put in `eval` mode.

        What was made is compared with the modules themselves on two batches of unequal lengths. The model
        goes on as it was, with one warning that says why, where the two differ by more than half precision
        does from float32, a compiler is missing or fails, memory runs out, or the backbones hold hooks or
        modules of another kind (as PEFT's). `embed`, `embed_to_store` and `rd-torch embed` call this
        themselves.
        """
        self.eval()
        if self._prepared is None or not self._prepared.is_current:
            self._prepared = None  # gives its memory back
            if hardware.has_engine(self.device):
                self._prepared = Prepared(self.family())
        return self

    def _run_prepared(self, tokens: Tensor, packing: Packing, levels: int) -> dict[str, Tensor] | None:
        """Raw embeddings by the prepared engine, which is made anew if its parameters have gone.

        None where this call may not use it, or there is none.
        """
        if self._prepared is None or self.training or torch.is_grad_enabled():
            return None
        if not self._prepared.is_current:
            self.prepare_inference()
        return self._prepared(tokens, packing, levels) if self._prepared else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the engine, which belongs to these very tensors."""
        return {**super().__getstate__(), "_prepared": None}

    def _run(
        self, tokens: Tensor, width: int | None, sink: AttentionSink | None = None
    ) -> tuple[Packing, dict[str, Tensor]]:
        """The batch's packing, and the packed raw embeddings of the levels that hold `width` features."""
        family = self.family(width)
        check_tokens(tokens)
        for backbone in family.values():
            backbone.require_device_of(tokens)
        packing = Packing.of(is_real(tokens))
        plain = packing.longest and sink is None and not tokens.is_floating_point()
        raw = self._run_prepared(tokens, packing, len(family)) if plain else None
        if raw is not None:
            return packing, raw
        sinks = dict.fromkeys(family) | {list(family)[-1]: sink}
        return packing, {name: each(tokens, packing, sinks[name]) for name, each in family.items()}

    def _nest(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What comes out at each level, of raw embeddings, smallest first."""
        return nest(raw, self.stages, self.config.predict_from)

    def _with_special_rows(self, nested: Tensor, ids: Tensor, packing: Packing, larger: Tensor) -> Tensor:
        """The padded nested embeddings, with special rows replaced where the checkpoint wants that."""
        if self.config.special_rows == "maps":
            return nested
        special = packing.real & ~is_residue(ids)
        own = packing.unpack(larger)[..., : nested.shape[-1]].to(nested.dtype)
        return torch.where(special[..., None], own, nested)

    def _listed(self, repr_layers: Iterable[int] | None) -> tuple[int, ...] | None:
        """The layers asked for, each once; raises a ValueError for hidden ones."""
        if repr_layers is None:
            return None
        layers = tuple(dict.fromkeys(map(int, repr_layers)))
        if set(layers) - {self.num_layers}:
            raise ValueError(
                f"expected repr_layers [{self.num_layers}] or none, got {list(layers)}: only the last layer "
                "has a reverse-distilled form; ask model.backbones for hidden layers"
            )
        return layers
