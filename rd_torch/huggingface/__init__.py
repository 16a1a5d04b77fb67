"""Classes that put a chain where code expects transformers' `EsmModel`, or one of the tasks on top of it.

They are loaded when one of them is asked for: nothing else in the package needs transformers.
"""

try:
    from rd_torch.huggingface.config import RDTransformersConfig
    from rd_torch.huggingface.encoder import TransformersEncoder
    from rd_torch.huggingface.tasks import (
        TransformersForMaskedLM,
        TransformersForSequenceClassification,
        TransformersForTokenClassification,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "expected the package transformers, whose models these classes stand in for, got none: "
        "pip install transformers"
    ) from error

__all__ = [
    "RDTransformersConfig",
    "TransformersEncoder",
    "TransformersForMaskedLM",
    "TransformersForSequenceClassification",
    "TransformersForTokenClassification",
]
