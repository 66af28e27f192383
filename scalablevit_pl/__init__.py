"""ScalableViT on PyTorch Lightning: train it, evaluate it, use it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalablevit_pl.data import ClassificationDataModule
    from scalablevit_pl.models import (
        ImageClassifier,
        ScalableViT,
        SemanticSegmenter,
        create_model,
        create_segmenter,
        from_pretrained,
        list_models,
    )
    from scalablevit_pl.tasks import ClassificationTask

__version__ = "0.1.0"

__all__ = [
    "ClassificationDataModule",
    "ClassificationTask",
    "ImageClassifier",
    "ScalableViT",
    "SemanticSegmenter",
    "__version__",
    "create_model",
    "create_segmenter",
    "from_pretrained",
    "list_models",
]

# Imported when first used: neither `import scalablevit_pl` nor `scalablevit --help` imports torch.
_HOMES = {
    "ClassificationDataModule": "data",
    "ClassificationTask": "tasks",
    "ImageClassifier": "models",
    "ScalableViT": "models",
    "SemanticSegmenter": "models",
    "create_model": "models",
    "create_segmenter": "models",
    "from_pretrained": "models",
    "list_models": "models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"scalablevit_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
