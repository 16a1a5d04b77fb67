"""`similarity`: cosines of nested vectors of any width, centred and scaled by what is known beforehand."""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from rd_torch.backbone import at_least_float32
from rd_torch.chain import Chain
from rd_torch.choices import Scale, check_choice
from rd_torch.nesting import Nesting

Vectors = TypeVar("Vectors", np.ndarray, Tensor)
Reference: TypeAlias = np.ndarray | Tensor | Chain | Nesting

CONSTANT: Final = 1e-5
"""Features whose standard deviation is at most this share of the largest say nothing, and are left out."""


def similarity(
    vectors: Vectors, others: Vectors | None = None, *, reference: Reference, scale: Scale = "feature"
) -> Vectors:
    """Compute the cosine similarities of nested vectors of any width, after centring and scaling.

    Raw cosines of embeddings lie close together, because all vectors share one large mean; and those of
    nested vectors see mostly the first features, because added ones vary less. Each feature is therefore
    taken as its distance from the mean of a reference, in standard deviations of that reference. The vectors
    that are compared have no part in that, so that a similarity does not depend on what else is asked for.
    Each feature has numbers of its own, so that vectors may be cut to any width first. In the shipped family
    that made neighbours of residues a little better; those of whole proteins hardly changed.

    Args:
        vectors: `(n, k)` vectors: the first k features of embeddings, of sequences or of residues.
        others: `(m, k)` vectors to compare them with; by default the same ones.
        reference: where mean and deviations come from. Either `(rows, k or more)` vectors of the same kind,
            such as those of a database, at least two; or the chain that made the vectors, a model or a
            `Nesting` that rd_torch fitted, which knows those of residues.
        scale: `"feature"` to divide by deviations, or `"none"` to centre only.

    Returns:
        `(n, m)` cosines, from -1 to 1, of the kind of `vectors`, in float32 or the dtype of `vectors`. A
        vector that lies at the mean has no direction, and 0 with every other one.

    Raises:
        ValueError: for shapes that do not fit, a reference that is too small or not finite, a chain of maps
            alone, or a scale that is neither of the two.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> sequences = ["MQIFVKTLTGKTITLEVEPS", "MQIFVRTLTGRTITLEVEPS", "MKWVTFISLLFLFSSAYS"]
        >>> vectors = rd_torch.embed(model, sequences)
        >>> found = rd_torch.similarity(vectors, reference=model)
        >>> bool(found[0, 1] > found[0, 2])
        True
        >>> rd_torch.similarity(vectors[:1, :48], vectors[:, :48], reference=vectors).shape
        (1, 3)
    """
    check_choice("scale", scale, ("none", "feature"))
    tables = [torch.as_tensor(each) for each in (vectors, vectors if others is None else others)]
    if any(each.ndim != 2 for each in tables) or tables[0].shape[1] != tables[1].shape[1]:
        shapes = " and ".join(str(tuple(each.shape)) for each in tables)
        raise ValueError(f"expected vectors (n, k) and others (m, k), got {shapes}")
    mean, factors = _statistics(reference, tables[0].shape[1])
    units = []
    for exact in (table.to(at_least_float32(table.dtype)) for table in tables):
        centred = exact - mean.to(exact)
        scaled = centred * factors.to(exact) if scale == "feature" else centred
        units.append(torch.nn.functional.normalize(scaled, dim=1))
    cosines = (units[0] @ units[1].to(units[0]).T).clamp(-1, 1)
    return cosines.numpy() if isinstance(vectors, np.ndarray) else cosines


def _statistics(reference: Reference, width: int) -> tuple[Tensor, Tensor]:
    """Return the means of the first features, and one over their deviations, 0 where there is none."""
    if isinstance(reference, Chain | Nesting):
        known = reference.reconstructor
        if known is None or not known.is_known:
            raise ValueError(
                "expected a chain that rd_torch fitted, or vectors, as reference, got a chain of maps alone, "
                "which knows no means"
            )
        mean, deviations = known.spread
    else:
        rows = torch.as_tensor(reference)
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"expected at least two vectors (rows, k) as reference, got {tuple(rows.shape)}")
        mean, deviations = rows.double().mean(0), rows.double().std(0)
        if not bool(mean.isfinite().all() and deviations.isfinite().all()):
            raise ValueError("expected a finite reference, got NaN or infinity")
    if len(mean) < width:
        raise ValueError(f"expected a reference of at least {width} features, got {len(mean)}")
    varies = deviations > CONSTANT * deviations.max()
    return mean[:width], torch.where(varies, 1 / deviations, 0)[:width]
