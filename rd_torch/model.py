"""`RDModel`: all backbones and stages in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone import AttentionSink, Packing, Prepared, check_tokens, is_real, is_residue, token_ids
from rd_torch.chain import Chain
from rd_torch.choices import Storage
from rd_torch.loading import Place, read_parts, write_chain
from rd_torch.nesting import Nesting
from rd_torch.output import RDOutput, check_layers
from rd_torch.reconstruct import Reconstruction
from rd_torch.stage import nest
from rd_torch.weights import Hub, PublishedOptions, Source, Upload, upload


class RDModel(Chain):
    """A family of backbones, and the stages that nest their embeddings, as one module.

    Every prefix of the embedding that ends at a level's width is, to the bit, the embedding of the
    chain that ends there (reverse distillation: Catrina et al., ICLR 2026, arXiv 2603.07710). The first
    backbone's is its own embedding to the bit, unless the chain has a `Basis`.

    Args:
        backbones: backbones by level name, smallest first, of one alphabet: modules of `rd_torch.ESM2`,
            `rd_torch.ESMC` or another `rd_torch.Backbone`, or `esm.ESM2` objects, whose tensors are shared,
            not copied. Their heads are frozen; everything else stays as trainable as it is.
        stages: stages, one fewer than backbones, from `solve_stages`, or from `concat_pca` for the baseline,
            or behind a `Basis`, from `change_basis`. They are kept in float32 (float64 where backbones are).
        predict_from: whether the stages' W acts on the nested embedding or on the previous raw one.
        special_rows: what stands at `<cls>`, `<eos>` and `<mask>` in the widest returned level: `"maps"` for
            what the maps give, `"larger"` for the backbone's raw rows, as in the published implementation.
        provenance: where backbones and maps come from; saved with the model.

    Raises:
        ValueError: for stages and backbones that do not fit together, or backbones of several alphabets.
        TypeError: for a module that is no backbone.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> _, _, tokens = model.alphabet.get_batch_converter()([("a protein", "MKV")])
        >>> model(tokens).embeddings.shape, model(tokens, width=48).embeddings.shape
        (torch.Size([1, 5, 128]), torch.Size([1, 5, 48]))
    """

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
        trust_remote_code: Collection[str] = (),
        **published: Unpack[PublishedOptions],
    ) -> Self:
        """Load a model in `eval` mode, with nothing but what `level` needs.

        Args:
            name_or_folder: a checkpoint of ours: folder, Hub id, or `"esm2-rd-mini"`, which comes with
                the package; the authors' maps: `"singhlab/plm_reverse_distillation"` or a folder that
                holds their `weights/`; or one ESM-2 or ESM-C: file, folder or Hub id; or, after `hf:`, the
                folder or Hub id of any encoder that transformers loads.
            level: name of the level that the chain ends at, by default the last; the authors' maps need one.
            dtype: dtype of the backbones, by default float32, or as our checkpoint stores them; the maps
                stay in float32 (float64 if that is asked for).
            device: device that the model is put on.
            backbones: other backbones by level: file, folder, Hub id, `hf:` and a folder or Hub id,
                `Reference` or module. A module is shared, unless it needs another dtype or device.
            revision: commit, tag or branch of the Hub id.
            cache_dir: folder of the Hub's cache, by default where `HF_HOME` has it.
            local_files_only: whether to read from the cache alone and never ask the network.
            trust_remote_code: names of models, as given after `hf:`, whose files may bring Python code that
                is then run; by default none.
            **published: which of the authors' maps to load, see `PublishedOptions`.

        Returns:
            The model.

        Raises:
            FileNotFoundError: for a checkpoint, or a file of it, that does not exist.
            ValueError: for a file that cannot be read or does not fit, a checksum that differs, or an
                unknown level or option.
        """
        hub = Hub(cache_dir, local_files_only, trust_remote_code)
        place = Place(dtype, device)
        config, family, stages, reconstructor = read_parts(
            name_or_folder, level, backbones, hub, place, revision, **published
        )
        model = cls.of(config, family, stages).to(device=device, dtype=dtype).eval()
        model.reconstructor = reconstructor
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        backbones: Storage = "included",
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        """Write config, maps, model card and backbones to a folder, for `from_pretrained` to read to the bit.

        Args:
            folder: folder to write, which is made if need be.
            backbones: `"included"` to write the tensors; `"referenced"` to write Hub id, commit and
                checksums in their place, for backbones that are just as they came from the Hub.
            cache_dir: folder of the Hub's cache, with whose files referenced backbones are compared.
            name: name of the model on its card, by default that of the folder.

        Raises:
            ValueError: for a backbone to be referenced that came from elsewhere or was changed since, or a
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
        """Save the model to a repository on the Hub, which is made if need be.

        Args:
            repo: id of the repository, `"name/chain"`.
            backbones: `"included"` or `"referenced"`, as in `save_pretrained`.
            cache_dir: folder of the Hub's cache, as in `save_pretrained`.
            **options: `private`, `token`, `revision` (a branch) and `commit_message`.

        Returns:
            The address of the commit.
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
        """Compute nested embeddings, logits and whatever else is asked for.

        Args:
            tokens: `(batch, time)` integer ids of `alphabet`, which is fair-esm's for ESM-2; or soft
                sequences: `(batch, time, 33)` distributions over it, with 1 at `<pad>` for padding, through
                which gradients reach the sequence. Masks are then made from each position's likeliest id.
            repr_layers: `[num_layers]` or None, as code written for fair-esm passes it; hidden layers
                have no reverse-distilled form.
            need_head_weights: whether to return attention maps of the largest backbone that runs.
            return_contacts: whether to return its contact probabilities, and its attention maps.
            width: number of features to return, by default all; backbones above the level that holds them
                do not run.

        Returns:
            An `RDOutput`; a batch without rows gives empty tensors.

        Raises:
            TypeError: for tokens that are neither integer nor floating.
            ValueError: for tokens of another rank or device, unknown ids, distributions that do not sum to
                one (within 0.005), a layer without a reverse-distilled form, or a width that does not exist.
        """
        layers = check_layers(repr_layers, self.num_layers)
        maps: list[Tensor] = []
        sink = maps.append if need_head_weights or return_contacts else None
        packing, raw = self._run_backbones(tokens, width, sink)
        levels = nest(raw, self.stages, self.config.predict_from)
        *_, name = raw
        nested = packing.unpack(levels[name][:, :width])
        separate = {} if self.config.is_nested else levels
        largest = self.backbones[name]
        logits = largest.logits(raw[name])
        attentions = torch.stack(maps, 1) if maps else None
        ids = token_ids(tokens, self.alphabet)
        return RDOutput(
            embeddings=self._set_special_rows(nested, ids, packing, raw[name]),
            logits=None if logits is None else packing.unpack(logits),
            residue_mask=is_residue(ids, self.alphabet),
            nested=nested,
            widths=tuple((name, self.config.widths[name]) for name in raw),
            num_layers=self.num_layers,
            separate={level: packing.unpack(part) for level, part in separate.items()},
            repr_layers=layers,
            attentions=attentions,
            contacts=None if attentions is None or not return_contacts else largest.contacts(ids, attentions),
        )

    def encode(self, tokens: Tensor, *, width: int | None = None) -> Tensor:
        """Compute the embeddings of `forward` alone, without logits, for bulk work.

        Args:
            tokens: ids or distributions, as for `forward`.
            width: number of features to return, by default all.

        Returns:
            `(batch, time, width)` nested embeddings, with zeros at padding.
        """
        packing, raw = self._run_backbones(tokens, width)
        *_, name = raw
        nested = packing.unpack(nest(raw, self.stages, self.config.predict_from)[name][:, :width])
        return self._set_special_rows(nested, token_ids(tokens, self.alphabet), packing, raw[name])

    def combine(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Return `(..., nested width)` embeddings from raw ones that people already hold; no backbone runs.

        Arguments and errors are those of `Nesting.combine`.
        """
        return Nesting(self.config, self.stages).combine(embeddings)

    def reconstruct(self, nested: Tensor, level: str) -> Reconstruction:
        """Return a level's raw embedding as `Nesting.reconstruct` estimates it from nested features."""
        return Nesting(self.config, self.stages, reconstructor=self.reconstructor).reconstruct(nested, level)

    def predict_contacts(self, tokens: Tensor) -> Tensor:
        """Return `(batch, residues, residues)` contact probabilities from the largest backbone."""
        return self(tokens, return_contacts=True).contacts

    def prepare_inference(self) -> RDModel:
        """Return this same model, made fast for inference on a CUDA device, for batches of any lengths.

        From then on, in `eval` mode and without gradients, parts of layers run fused, small batches are
        replayed as CUDA graphs of a few packed sizes, and smaller backbones run beside the largest. The
        first batch of a size takes longer; nothing is compiled for it. Parameters stay shared and
        trainable; when they move or are replaced, what was derived from them is made again. On other
        devices nothing would be faster, and the model is only put in `eval` mode.

        The fast path is compared with the modules themselves on two batches of unequal lengths. Where the
        two differ by more than half precision differs from float32, a compiler is missing or fails, memory
        runs out, or the backbones hold hooks or modules of another kind (as PEFT's), the model goes on
        without it, and one warning says why. `embed`, `embed_to_store` and `rd-torch embed` call this
        themselves.
        """
        self.eval()
        if self._prepared is None or not self._prepared.is_current:
            self._prepared = None  # first, so that two engines are never in memory at once
            if hardware.has_engine(self.device):
                self._prepared = Prepared(self.family())
        return self

    def _run_prepared(self, tokens: Tensor, packing: Packing, count: int) -> dict[str, Tensor] | None:
        """Return raw embeddings of the first `count` backbones by the engine; None where it may not run.

        The engine is made anew if parameters have been moved or replaced.
        """
        if self._prepared is None or self.training or torch.is_grad_enabled():
            return None
        if not self._prepared.is_current:
            self.prepare_inference()
        return self._prepared(tokens, packing, count) if self._prepared else None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the engine, which reads these very tensors and no copies of them."""
        return {**super().__getstate__(), "_prepared": None}

    def _run_backbones(
        self, tokens: Tensor, width: int | None, sink: AttentionSink | None = None
    ) -> tuple[Packing, dict[str, Tensor]]:
        """Return the batch's packing, and packed raw embeddings of the levels that `width` features need."""
        family = self.family(width)
        check_tokens(tokens, self.alphabet)
        for backbone in family.values():
            backbone.require_device_of(tokens)
        packing = Packing.of(is_real(tokens, self.alphabet))
        # The engine takes ids and no distributions, builds no attention maps, and needs a token.
        plain = packing.longest and sink is None and not tokens.is_floating_point()
        raw = self._run_prepared(tokens, packing, len(family)) if plain else None
        if raw is not None:
            return packing, raw
        sinks = dict.fromkeys(family) | {list(family)[-1]: sink}
        return packing, {name: each(tokens, packing, sinks[name]) for name, each in family.items()}

    def _set_special_rows(self, nested: Tensor, ids: Tensor, packing: Packing, larger: Tensor) -> Tensor:
        """Return padded nested embeddings, with special rows replaced where the checkpoint asks for that."""
        if self.config.special_rows == "maps":
            return nested
        special = packing.real & ~is_residue(ids, self.alphabet)
        own = packing.unpack(larger)[..., : nested.shape[-1]].to(nested.dtype)
        return torch.where(special[..., None], own, nested)
