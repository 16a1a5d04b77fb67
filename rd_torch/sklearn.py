"""Embed sequences as a step of scikit-learn's pipelines.

Examples:
    >>> from rd_torch.sklearn import Embedder
    >>> Embedder(width=48).fit_transform(["MQIFVKTL", "MKV"]).shape
    (2, 48)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import numpy as np

from rd_torch.embedder import require_prefixes
from rd_torch.embedding import embed
from rd_torch.letters import Corrections, read_residues
from rd_torch.model import RDModel
from rd_torch.pooling import Pools, cut_ways, pool_name, pools_of
from rd_torch.reading import sequences_of

try:
    from sklearn.base import BaseEstimator, TransformerMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "expected scikit-learn for rd_torch.sklearn, got none: pip install rd_torch[learn]"
    ) from error

MOST_BYTES: Final = 2**30
"""Bytes of embeddings that are kept for a model; beyond them the oldest are forgotten."""

SEQUENCES_AT_ONCE: Final = 4096
"""Number of sequences that are embedded between two looks at how much is kept."""


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A transformer of scikit-learn's that turns sequences into nested embeddings.

    Embeddings are kept in memory by model and sequence, so that no backbone runs twice on a sequence that it
    has seen at this width or a wider one. A clone shares the model and what is kept, and remembers the
    widest width of what it was cloned from. So a search over `width` that begins with `Embedder()` embeds
    each sequence that a head is fitted on once, by all backbones, and cuts it to every width. On sequences
    that are not kept, `transform` runs the backbones that `width` needs and no others.

    Nothing is learnt from sequences or labels, so that cross-validation around it is honest. Processes that
    joblib starts load a model that was given by name themselves, and embed for themselves; threads share.
    What is kept is not pickled.

    Args:
        model: name or folder of a chain, as in `RDModel.from_pretrained`, or an `RDModel`, which is shared.
        level: name of the level at which a chain that is given by name ends; by default the last.
        width: number of features, from the first on, for each way to pool; by default all.
        pool: how the embeddings of a sequence's residues become one vector, as in `rd_torch.embed`.
        tokens_per_batch: number of tokens that a batch holds at most, as in `rd_torch.embed`.

    Examples:
        >>> from sklearn.linear_model import Ridge
        >>> from sklearn.model_selection import GridSearchCV
        >>> from sklearn.pipeline import make_pipeline
        >>> from rd_torch.sklearn import Embedder
        >>> sequences = ["MQIFVKTL", "MKTAYIAK", "GSHMLEDP", "MKWVTFIS", "ACDEFGHI", "KLMNPQRS"]
        >>> search = GridSearchCV(make_pipeline(Embedder(), Ridge()), {"embedder__width": [32, 64]}, cv=2)
        >>> search.fit(sequences, [0.1, 0.4, 0.2, 0.9, 0.3, 0.5]).predict(["MQIFVK"]).shape
        (1,)
    """

    def __init__(
        self,
        model: str | RDModel = "esm2-rd-mini",
        *,
        level: str | None = None,
        width: int | None = None,
        pool: Pools = "mean",
        tokens_per_batch: int | None = None,
    ) -> None:
        self.model = model
        self.level = level
        self.width = width
        self.pool = pool
        self.tokens_per_batch = tokens_per_batch

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the options and the sequences; nothing is learnt, and no backbone runs.

        Args:
            X: sequences, as `rd_torch.embed` takes them.
            y: labels, which are not looked at.

        Returns:
            This transformer.

        Raises:
            TypeError: for anything else than sequences.
            ValueError: for an option that does not exist, and a string that is no sequence.
        """
        self._read(X)
        self._settle()
        return self

    def fit_transform(self, X: Any, y: Any = None, **_: Any) -> Any:
        """Embed sequences by all backbones that the original of this clone asks for, and cut.

        Args:
            X: sequences, as `rd_torch.embed` takes them.
            y: labels, which are not looked at.

        Returns:
            `(sequences, ways * width)` embeddings, as `transform` gives them.

        Raises:
            TypeError: for anything else than sequences.
            ValueError: for an option that does not exist, and a string that is no sequence.
        """
        letters = self._read(X)
        chain, width = self._settle()
        reach = chain.embed_dim if self._reach is None else max(width, min(self._reach, chain.embed_dim))
        self._embed(chain, letters, reach)
        return self.transform(X)

    def transform(self, X: Any) -> np.ndarray:
        """Embed sequences by the backbones that `width` needs.

        Args:
            X: sequences, as `rd_torch.embed` takes them.

        Returns:
            `(sequences, ways * width)` embeddings in float32, or in the dtype of the maps.

        Raises:
            TypeError: for anything else than sequences.
            ValueError: for an option that does not exist, and a string that is no sequence.
        """
        letters = self._read(X)
        chain, width = self._settle()
        way = pool_name(self.pool)
        rows = [cut_ways(each, width, way) for each in self._embed(chain, letters, width)]
        return np.stack(rows) if rows else np.zeros((0, width * len(pools_of(way))), np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the features: the way to pool and the number of the feature, from 0.

        Args:
            input_features: is not looked at.

        Returns:
            An array of names.
        """
        _, width = self._settle()
        names = [f"{way}{place}" for way in pools_of(pool_name(self.pool)) for place in range(width)]
        return np.asarray(names, dtype=object)

    def _read(self, X: Any) -> list[str]:
        """Return the residues of sequences; one warning counts the letters that are none."""
        corrections = Corrections()
        letters = []
        for number, each in enumerate(sequences_of(X), start=1):
            try:
                letters.append(read_residues(each, corrections, kind=self._chain().alphabet.kind))
            except ValueError as error:
                raise ValueError(f"{error}, in record number {number:,}") from error
        corrections.warn()
        return letters

    def _chain(self) -> RDModel:
        """Return the model, loaded once a process."""
        if isinstance(self.model, str):
            return _load(self.model, self.level)
        return self.model

    def _settle(self) -> tuple[RDModel, int]:
        """Return the model and the width, and refuse options that do not exist."""
        chain = self._chain()
        if pool_name(self.pool) == "none":
            raise ValueError("expected a pool that gives a vector a sequence, got 'none'")
        require_prefixes(chain.config, pool_name(self.pool))
        chain.config.require_width(self.width)
        return chain, chain.embed_dim if self.width is None else self.width

    def _embed(self, chain: RDModel, letters: Sequence[str], width: int) -> list[np.ndarray]:
        """Return the embedding of each sequence at this width or a wider one."""
        kept = _kept(chain)
        way = pool_name(self.pool)
        return kept.take(
            way,
            letters,
            width,
            lambda missing: embed(
                chain, missing, pool=way, width=width, tokens_per_batch=self.tokens_per_batch
            ),
        )

    @property
    def _reach(self) -> int | None:
        """The widest width of what this was cloned from; None for all features."""
        return getattr(self, "_widest", self.width)

    def __sklearn_clone__(self) -> Self:
        clone = type(self)(**self.get_params(deep=False))
        clone._widest = (
            self._reach if self._reach is None or self.width is None else max(self._reach, self.width)
        )
        return clone

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.requires_fit = False
        return tags


class Kept:
    """Embeddings of a model that are kept, by way to pool and sequence, each at the widest width seen.

    Attributes:
        lock: is held while something is embedded, so that threads do not embed the same sequences.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._state = ""
        self._vectors: dict[tuple[str, str], np.ndarray] = {}
        self._bytes = 0

    def require_state(self, state: str) -> None:
        """Forget everything where the model has changed since.

        Args:
            state: what tells the model's tensors from others.
        """
        if state != self._state:
            self._state, self._bytes = state, 0
            self._vectors.clear()

    def take(
        self, way: str, letters: Sequence[str], width: int, compute: Callable[[list[str]], Any]
    ) -> list[np.ndarray]:
        """Return the embeddings of sequences, and compute those that are not kept.

        Args:
            way: ways to pool, as `pool_name` joins them.
            letters: residues of the sequences.
            width: least number of features, for each way to pool.
            compute: embeds sequences at that width.

        Returns:
            The embedding of each sequence, at that width or a wider one.
        """
        features = width * len(pools_of(way))
        with self.lock:
            found = {each: self._vectors.get((way, each)) for each in letters}
            missing = [each for each, vector in found.items() if vector is None or len(vector) < features]
            for start in range(0, len(missing), SEQUENCES_AT_ONCE):
                part = missing[start : start + SEQUENCES_AT_ONCE]
                for each, vector in zip(part, compute(part), strict=True):
                    found[each] = vector
                    self._keep((way, each), vector)
            return [vector for each in letters if (vector := found[each]) is not None]

    def _keep(self, key: tuple[str, str], vector: np.ndarray) -> None:
        """Keep a vector, and forget the oldest ones where there are too many."""
        before = self._vectors.pop(key, None)
        self._bytes += vector.nbytes - (0 if before is None else before.nbytes)
        self._vectors[key] = vector.copy()  # not a view that holds a whole batch
        while self._bytes > MOST_BYTES and len(self._vectors) > 1:
            oldest = next(iter(self._vectors))
            self._bytes -= self._vectors.pop(oldest).nbytes


_LOCK: Final = threading.Lock()
_LOADED: Final[dict[tuple[str, str | None], RDModel]] = {}
_KEPT: Final[weakref.WeakKeyDictionary[RDModel, Kept]] = weakref.WeakKeyDictionary()


def _load(name: str, level: str | None) -> RDModel:
    """Return the model of this name, which is loaded once a process."""
    with _LOCK:
        if (name, level) not in _LOADED:
            _LOADED[name, level] = RDModel.from_pretrained(name, level)
        return _LOADED[name, level]


def _kept(chain: RDModel) -> Kept:
    """Return what is kept of a model, empty where its tensors have changed since."""
    with _LOCK:
        kept = _KEPT.setdefault(chain, Kept())
    tensors = [*chain.parameters(), *chain.buffers()]
    state = str([(each.data_ptr(), each._version, str(each.dtype), str(each.device)) for each in tensors])
    with kept.lock:
        kept.require_state(state)
    return kept
