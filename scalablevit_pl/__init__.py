"""ScalableViT on PyTorch Lightning: train it, evaluate it, use it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalablevit_pl.data import ClassificationDataModule
    from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model, list_models
    from scalablevit_pl.tasks import ClassificationTask

    from_pretrained = ImageClassifier.from_pretrained

__version__ = "0.1.0"

__all__ = [
    "ClassificationDataModule",
    "ClassificationTask",
    "ImageClassifier",
    "ScalableViT",
    "__version__",
    "create_model",
    "from_pretrained",
    "list_models",
]

# Looked up when first used, so that `import scalablevit_pl` and the command's --help need not wait for torch.
_HOMES = {
    "ClassificationDataModule": "data",
    "ClassificationTask": "tasks",
    "ImageClassifier": "models",
    "ScalableViT": "models",
    "create_model": "models",
    "list_models": "models",
}


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":
        return __getattr__("ImageClassifier").from_pretrained
    if name in _HOMES:
        return getattr(importlib.import_module(f"scalablevit_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
