"""The networks, in plain PyTorch."""

from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention
from scalablevit_pl.models.classifier import ImageClassifier
from scalablevit_pl.models.factory import build_classifier, create_model, create_segmenter, from_pretrained, list_models
from scalablevit_pl.models.fusion import fuse
from scalablevit_pl.models.pretrained import PretrainedNetwork
from scalablevit_pl.models.scalablevit import ScalableViT, scalablevit_b, scalablevit_l, scalablevit_nano, scalablevit_s
from scalablevit_pl.models.segmenter import SemanticSegmenter

__all__ = [
    "ImageClassifier",
    "InteractiveWindowSelfAttention",
    "PretrainedNetwork",
    "ScalableSelfAttention",
    "ScalableViT",
    "SemanticSegmenter",
    "build_classifier",
    "create_model",
    "create_segmenter",
    "from_pretrained",
    "fuse",
    "list_models",
    "scalablevit_b",
    "scalablevit_l",
    "scalablevit_nano",
    "scalablevit_s",
]
