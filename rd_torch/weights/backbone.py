"""One backbone's tensors from wherever a user has them: a file, a folder, the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from rd_torch.backbone import EMBEDDING
from rd_torch.config import ESM2_LEVELS, Level, Reference
from rd_torch.weights.folder import CONFIG, backbone_file
from rd_torch.weights.hub import Hub, MissingFileError
from rd_torch.weights.known import reference_to
from rd_torch.weights.names import ANGLES, SHARED_ANGLES, complete, rename
from rd_torch.weights.tensors import Tensors, read_json, read_tensors, require_file, require_finite

Source: TypeAlias = str | Path | Reference
"""A file, a folder, a Hub id, or a Hub id with its revision and checksums."""

LAYOUTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
REGRESSION: Final = "-contact-regression.pt"

# What transformers' config must say of an ESM-2, whose numerics these are.
_FACTS: Final = {
    "model_type": "esm",
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "token_dropout": True,
    "layer_norm_eps": 1e-5,
    "vocab_size": 33,
}


@dataclass(frozen=True)
class Files:
    """The weight files of one backbone.

    Attributes:
        place: what to call them in messages.
        paths: where they are.
        reference: commit and checksums, where they came from the Hub.
    """

    place: str
    paths: tuple[Path, ...]
    reference: Reference | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors under fair-esm's names, whatever they are called there; mapped, not yet read.

        Raises:
            ValueError: for a model with absolute positions, which is no ESM-2.
        """
        absolute, angles = False, False
        for path in self.paths:
            for written, tensor in read_tensors(path):
                name = rename(written)
                absolute |= "position_embeddings" in written
                angles |= name is not None and name.endswith("inv_freq")
                if name is not None:
                    yield name, tensor
        if absolute and not angles:
            raise ValueError(f"expected an ESM-2, got a model with absolute positions in {self.place}")


def find_backbone(source: Source, hub: Hub, level: str | None = None) -> Files:
    """The files that a source means, downloaded if need be.

    Args:
        source: a file, a folder, a Hub id or a reference; of ESM-2's own Hub ids, revision and
            checksums are known and checked.
        hub: how to reach the Hub.
        level: which one of a folder that is a checkpoint of ours.

    Raises:
        FileNotFoundError: where nothing is.
        ValueError: for a checksum or a config that is not ESM-2's.
    """
    if isinstance(source, Reference):
        return _fetch(source, hub)
    path = Path(source)
    ours = path / backbone_file(str(level))
    if ours.is_file():
        return Files(str(ours), (ours,))
    if path.exists():
        return Files(str(path), tuple(_list_files(path)))
    if isinstance(source, Path) or not looks_like_a_repository(source):
        raise FileNotFoundError(f"expected a file, a folder or a Hub id, got {str(source)!r}, which is none")
    return _fetch(reference_to(source), hub)


def read_level(files: Files, name: str | None = None) -> Level:
    """A backbone's level: the ESM-2 of its shape, else by the file's name.

    Args:
        files: where the backbone is.
        name: the level that it has to be.

    Raises:
        ValueError: for files that do not read, or are no ESM-2 of that level's shape.
    """
    level = _level({each: tuple(tensor.shape) for each, tensor in files.tensors()}, name, files)
    return replace(level, reference=files.reference)


def read_backbone(
    files: Files,
    level: Level,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensors:
    """A backbone's tensors under fair-esm's names, one after the other straight in dtype and on device.

    Tensors that need neither conversion nor a move stay views of the mapped file.

    Args:
        files: where the backbone is.
        level: its shape.
        dtype: of the weights, by default as stored; `inv_freq` stays in float32 at least.
        device: where they go.

    Raises:
        ValueError: for files that do not read or hold NaN.
    """
    tensors = {name: _convert(name, tensor, dtype, device) for name, tensor in files.tensors()}
    require_finite(tensors, files.place)
    try:
        return complete(tensors, level.num_layers, level.width // level.attention_heads)
    except ValueError as error:
        raise ValueError(f"{error} in {files.place}") from error


def require_unchanged(level: Level, tensors: Mapping[str, Tensor], hub: Hub) -> None:
    """Raises a ValueError unless the tensors are, in their dtype, those that the level's reference means."""
    if level.reference is None:
        raise ValueError(
            f"expected a backbone from the Hub at level {level.name}, got one from elsewhere: "
            'save with backbones="included"'
        )
    stored = read_backbone(find_backbone(level.reference, hub), level)
    for name, tensor in tensors.items():
        if not torch.equal(stored[name].to(tensor.dtype), tensor.cpu()):
            raise ValueError(
                f"expected backbone {level.name} as it came from {level.reference.repo}, got another {name}: "
                'save with backbones="included"'
            )


def _convert(
    name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """A tensor in dtype and on device; `inv_freq` never in a half type."""
    if not tensor.is_floating_point():
        raise ValueError(f"expected weights, got {name} of {tensor.dtype}")
    if dtype is not None and name.endswith("inv_freq"):
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(device=device, dtype=dtype)


def _check_facts(config: Path, place: str) -> None:
    """Raises a ValueError for a `config.json` of transformers that is not an ESM-2's."""
    facts = read_json(config)
    for key, expected in _FACTS.items():
        if facts.get(key, expected) != expected:
            raise ValueError(f"expected an ESM-2 with {key} {expected!r}, got {facts[key]!r} in {place}")


def _fetch(reference: Reference, hub: Hub) -> Files:
    """The weight files of a reference, and the reference with what came: commit and checksums."""
    one_commit = reference
    with suppress(MissingFileError):  # the tensors tell nearly as much
        config = hub.fetch(reference, CONFIG)
        one_commit = replace(reference, revision=config.commit)
        _check_facts(config.path, reference.repo)
    names, commit = (list(reference.sha256), None) if reference.sha256 else _layout(one_commit, hub)
    one_commit = replace(one_commit, revision=commit or one_commit.revision)
    fetched = {name: hub.fetch(one_commit, name) for name in names}
    paths = tuple(file.path for file in fetched.values())
    commit = next(iter(fetched.values())).commit
    came = Reference(reference.repo, commit, {name: file.sha256 for name, file in fetched.items()})
    return Files(reference.repo, paths, came)


def _layout(reference: Reference, hub: Hub) -> tuple[list[str], str]:
    """The names of a repository's weight files, of the first layout that it has, and their commit."""
    missing: list[MissingFileError] = []
    for layout in LAYOUTS:
        try:
            found = hub.fetch(reference, layout)
        except MissingFileError as error:
            missing.append(error)
        else:
            names = _shards(found.path) if layout.endswith(".json") else [layout]
            return names, found.commit
    raise missing[0]


def list_weights(folder: Path) -> list[Path]:
    """Files of a folder that look like a backbone's weights, as transformers or fair-esm name them."""
    layouts = [folder / layout for layout in LAYOUTS if (folder / layout).is_file()]
    return layouts[:1] or [path for path in folder.glob("*.pt") if not path.name.endswith(REGRESSION)]


def looks_like_a_repository(name: str) -> bool:
    """Whether a name can be a Hub id: owner and repository, and no weight file's ending."""
    return name.count("/") == 1 and Path(name).suffix not in {".pt", ".bin", ".safetensors"}


def _list_files(path: Path) -> list[Path]:
    """The weight files of a local file or folder."""
    if path.is_file():
        regression = path.with_name(path.stem + REGRESSION)
        return [path, regression] if path.suffix == ".pt" and regression.is_file() else [path]
    if (path / CONFIG).is_file():
        _check_facts(path / CONFIG, str(path))
    weights = list_weights(path)
    if len(weights) != 1:
        raise FileNotFoundError(
            f"expected one of {', '.join(LAYOUTS)} or one .pt file in {path}, got {len(weights)} of them"
        )
    if weights[0].suffix == ".json":
        return [require_file(path / name) for name in _shards(weights[0])]
    return _list_files(weights[0])


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"expected an index of shards in {index}, got {error!r}") from error
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise ValueError(f"expected shards beside {index}, got {strange[0]!r}")
    return names


def _level(shapes: Mapping[str, tuple[int, ...]], name: str | None, files: Files) -> Level:
    """The shape of a backbone, read from its tensors' and compared with the level it is to be."""
    layers = {int(each.split(".")[1]) for each in shapes if each.startswith("layers.")}
    if EMBEDDING not in shapes or not layers:
        few = ", ".join(sorted(shapes)[:3]) or "no tensors"
        raise ValueError(f"expected an ESM-2 in {files.place}, got a file with {few}")
    num_layers, width = max(layers) + 1, shapes[EMBEDDING][-1]
    esm2 = [each for each in ESM2_LEVELS.values() if (each.num_layers, each.width) == (num_layers, width)]
    angles = shapes.get(SHARED_ANGLES, shapes.get(ANGLES.format(0)))
    regression = shapes.get("contact_head.regression.weight")
    if angles:
        heads = width // (2 * angles[-1])
    elif regression:
        heads = regression[-1] // num_layers
    elif esm2:
        heads = esm2[0].attention_heads
    else:
        raise ValueError(
            f"expected inv_freq or a contact head, to tell the number of heads, in {files.place}, got neither"
        )
    known = esm2[0].name if esm2 and esm2[0].attention_heads == heads else None
    expected = ESM2_LEVELS.get(name or "")
    if expected and name != known:
        raise ValueError(
            f"expected the {name} of ESM-2, {expected.num_layers} layers of width {expected.width}, "
            f"got {num_layers} layers of width {width} in {files.place}"
        )
    return Level(name or known or Path(files.place).stem.replace(".", "_"), num_layers, width, heads)
