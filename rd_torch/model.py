"""`RDModel`: all backbones and stages in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, Unpack

import torch
from torch import Tensor, nn

from rd_torch.backbone import Packing, is_residue, token_ids
from rd_torch.choices import Storage
from rd_torch.loading import Place, read_parts, write_chain
from rd_torch.nesting import Nesting
from rd_torch.output import RDOutput, check_layers
from rd_torch.reconstruct import Reconstruction
from rd_torch.running import Running
from rd_torch.stage import nest
from rd_torch.weights import Hub, PublishedOptions, Source, Upload, upload


class RDModel(Running):
    """A family of backbones, and the stages that nest their embeddings, as one module.

    Every prefix of the embedding that ends at a level's width is, to the bit, the embedding of the
    chain that ends there (reverse distillation: Catrina et al., ICLR 2026, arXiv 2603.07710). The first
    backbone's is its own embedding to the bit, unless the chain has a `Basis`.

    Args:
        backbones: backbones by level name, smallest first, of one alphabet: modules of `rd_torch.ESM2`,
            `rd_torch.ESMC` or another `rd_torch.Backbone`, or `esm.ESM2` objects, whose tensors are shared,
            not copied. Their heads are frozen; everything else stays as trainable as it is.
            A name with `@` and a number, such as `"650M@25"`, takes the hidden states of that layer, and
            layers above it are left out. Several layers of one backbone, `"650M@16"` and `"650M@25"`, are
            given as the same module, which runs once.
        stages: stages, one fewer than levels, from `solve_stages`, or from `concat_pca` for the baseline,
            or behind a `Basis`, from `change_basis`. They are kept in float32 (float64 where backbones are).
        predict_from: whether the stages' W acts on the nested embedding or on the previous raw one.
        special_rows: what stands at `<cls>`, `<eos>` and `<mask>` in the widest returned level: `"maps"` for
            what the maps give, `"larger"` for the backbone's raw rows, as in the published implementation.
        final_norm: whether the LayerNorm after a backbone's last layer acts on hidden states of other layers
            too, as it did when the stages were fitted.
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
        layers: Mapping[str, int] | None = None,
        **published: Unpack[PublishedOptions],
    ) -> Self:
        """Load a model in `eval` mode, with nothing but what `level` needs.

        Args:
            name_or_folder: a checkpoint of ours: folder, Hub id, or `"esm2-rd-mini"`, which comes with
                the package; the authors' maps: `"singhlab/plm_reverse_distillation"` or a folder that
                holds their `weights/`; or one ESM-2 or ESM-C: file, folder or Hub id; or, after `hf:`, the
                folder or Hub id of any encoder that transformers loads.
            level: name of the level that the chain ends at, by default the last; the authors' maps need one.
                Of a single backbone, any layer can be named: `"650M@25"`.
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
            layers: by backbone, the layer that its level is taken at, `{"650M": 25}`: any layer of a single
                backbone, and otherwise the layer that the maps were fitted to.
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
            name_or_folder, level, backbones, hub, place, revision, layers, **published
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
            repr_layers: `[num_layers]` or None, as code written for fair-esm passes it; numbers of layers of
                the largest backbone that are levels of this chain are taken too. Other hidden layers have no
                reverse-distilled form.
            need_head_weights: whether to return attention maps of the largest backbone that runs.
            return_contacts: whether to return its contact probabilities, and its attention maps.
            width: number of features to return, by default all; backbones above the level that holds them
                do not run.

        Returns:
            An `RDOutput`; a batch without rows gives empty tensors.

        Raises:
            TypeError: for tokens that are neither integer nor floating.
            ValueError: for tokens of another rank or device, unknown ids, distributions that do not sum to
                one (within 0.005), a layer without a reverse-distilled form, contacts of a backbone of which
                some layers do not run, or a width that does not exist.
        """
        needed = self.config.levels_for(width)
        hidden = {layer: level for layer, level in self.config.layers.items() if level in needed}
        layers = check_layers(repr_layers, self.num_layers, hidden)
        if return_contacts and not self.config.level(needed[-1]).is_last:
            raise ValueError(
                "expected a chain that ends with the last layer of a backbone, whose contact head needs all "
                f"layers, got one that ends with {needed[-1]}"
            )
        maps: list[Tensor] = []
        sink = maps.append if need_head_weights or return_contacts else None
        packing, raw = self._run_backbones(tokens, width, sink)
        levels = nest(raw, self.stages, self.config.predict_from)
        *_, name = raw
        nested = packing.unpack(levels[name][:, :width])
        separate = {} if self.config.is_nested else levels
        largest = self.family()[name]
        # Heads take what comes out of the last layer, and nothing else.
        logits = largest.logits(raw[name]) if self.config.level(name).is_last else None
        attentions = torch.stack(maps, 1) if maps else None
        ids = token_ids(tokens, self.alphabet)
        return RDOutput(
            embeddings=self._set_special_rows(nested, ids, packing, raw[name]),
            logits=None if logits is None else packing.unpack(logits),
            residue_mask=is_residue(ids, self.alphabet),
            nested=nested,
            widths=tuple((name, self.config.widths[name]) for name in raw),
            num_layers=self.num_layers,
            layers=tuple(hidden.items()),
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

    def _set_special_rows(self, nested: Tensor, ids: Tensor, packing: Packing, larger: Tensor) -> Tensor:
        """Return padded nested embeddings, with special rows replaced where the checkpoint asks for that."""
        if self.config.special_rows == "maps":
            return nested
        special = packing.real & ~is_residue(ids, self.alphabet)
        own = packing.unpack(larger)[..., : nested.shape[-1]].to(nested.dtype)
        return torch.where(special[..., None], own, nested)
