"""Where published files lie on the Hub, at which revision, and with which checksums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rd_torch.levels import ESMC_LEVELS, Reference

PUBLISHED_MAPS: Final = "singhlab/plm_reverse_distillation"
"""The repository of the authors' maps (Catrina et al., ICLR 2026), whose checksums nobody published."""

ESM2_ON_HUB: Final[Mapping[str, Reference]] = {
    "8M": Reference(
        "facebook/esm2_t6_8M_UR50D",
        "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
        {"model.safetensors": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189"},
    ),
    "35M": Reference(
        "facebook/esm2_t12_35M_UR50D",
        "6fbf070e65b0b7291e7bbcd451118c216cff79d8",
        {"model.safetensors": "e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0"},
    ),
    "150M": Reference(
        "facebook/esm2_t30_150M_UR50D",
        "a695f6045e2e32885fa60af20c13cb35398ce30c",
        {"model.safetensors": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566"},
    ),
    "650M": Reference(
        "facebook/esm2_t33_650M_UR50D",
        "08e4846e537177426273712802403f7ba8261b6c",
        {"model.safetensors": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0"},
    ),
    "3B": Reference(
        "facebook/esm2_t36_3B_UR50D",
        "476b639933c8baad5ad09a60ac1a87f987b656fc",
        {
            "pytorch_model-00001-of-00002.bin": (
                "0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412"
            ),
            "pytorch_model-00002-of-00002.bin": (
                "7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c"
            ),
        },
    ),
    "15B": Reference("facebook/esm2_t48_15B_UR50D"),
}
"""The repository of each size of ESM-2, by level.

The revision and checksums of 15B are not known; `PINNED_ON_FIRST_USE` says what is done instead.
"""

ESMC_ON_HUB: Final[Mapping[str, Reference]] = {name: Reference(f"biohub/ESMC-{name}") for name in ESMC_LEVELS}
"""The repository of each size of ESM-C, by level; their revisions and checksums are not known."""

ON_HUB: Final[Mapping[str, Mapping[str, Reference]]] = {"esm2": ESM2_ON_HUB, "esmc": ESMC_ON_HUB}
"""The repositories of every family, by the name that `rd-torch fit --backbones` takes."""

FAIR_ESM_SHA256: Final[Mapping[str, str]] = {
    "esm2_t6_8M_UR50D.pt": "46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928",
    "esm2_t12_35M_UR50D.pt": "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e",
    "esm2_t30_150M_UR50D.pt": "881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62",
    "esm2_t33_650M_UR50D.pt": "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
    "esm2_t36_3B_UR50D.pt": "7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500",
}
"""The checksums of fair-esm's own files, which `rd-torch verify` compares with; that of 15B is not known."""

PINNED_ON_FIRST_USE: Final = (
    PUBLISHED_MAPS,
    ESM2_ON_HUB["15B"].repo,
    *(reference.repo for reference in ESMC_ON_HUB.values()),
)
"""Repositories without known checksums: the commit and checksums of the first download hold from then on."""

FAIR_ESM_NAMES: Final[Mapping[str, str]] = {
    level: reference.repo.split("/")[1] + ".pt" for level, reference in ESM2_ON_HUB.items()
}
"""The name that fair-esm gives the file of each level."""


def reference_to(repo: str, revision: str | None = None) -> Reference:
    """Refer to a repository on the Hub.

    Args:
        repo: name of the repository, `"owner/name"`.
        revision: commit, tag or branch.

    Returns:
        The reference. For a known repository without a `revision` it holds the known commit and checksums.
    """
    known = {reference.repo: reference for levels in ON_HUB.values() for reference in levels.values()}
    return known[repo] if repo in known and revision is None else Reference(repo, revision)
