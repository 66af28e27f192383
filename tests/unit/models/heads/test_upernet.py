"""UperNet and its auxiliary head against the ones of transformers, with the same weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalablevit_pl.models import ScalableViT, SemanticSegmenter

DIMS = (8, 16, 24, 32)
# Names of this project's modules and of the ones in transformers.
RENAMED = {
    "decoder.pools.": "decode_head.psp_modules.",
    "decoder.bottleneck.": "decode_head.bottleneck.",
    "decoder.laterals.": "decode_head.lateral_convs.",
    "decoder.outputs.": "decode_head.fpn_convs.",
    "decoder.fusion.": "decode_head.fpn_bottleneck.",
    "decoder.classifier.": "decode_head.classifier.",
    "auxiliary.conv.": "auxiliary_head.convs.0.",
    "auxiliary.classifier.": "auxiliary_head.classifier.",
}


class Backbone(nn.Module):
    """The normalized maps of a segmenter, as transformers expects them of a backbone."""

    def __init__(self, segmenter: SemanticSegmenter) -> None:
        super().__init__()
        self.segmenter, self.channels = segmenter, segmenter.backbone.channels

    def forward_with_filtered_kwargs(self, pixels: Tensor, **options: Any) -> Any:
        maps = [
            F.layer_norm(features.movedim(1, -1), norm.weight.shape, norm.weight, norm.bias, 1e-6).movedim(-1, 1)
            for norm, features in zip(self.segmenter.head.norms, self.segmenter.backbone(pixels), strict=True)
        ]
        return SimpleNamespace(feature_maps=maps, hidden_states=None, attentions=None)


def renamed(name: str) -> str:
    ours = next(prefix for prefix in RENAMED if name.startswith(prefix))
    name = RENAMED[ours] + name.removeprefix(ours).replace("norm.", "batch_norm.")
    if "psp_modules" in name:
        name = name.replace(".conv.", ".1.conv.").replace(".batch_norm.", ".1.batch_norm.")
    return name


@pytest.fixture(scope="module")
def segmenter() -> SemanticSegmenter:
    torch.manual_seed(0)
    backbone = ScalableViT(DIMS, (1, 2, 3, 4), (1, 1, 1, 1))
    network = SemanticSegmenter(backbone, 7, "upernet", width=16, auxiliary=True)
    for name, tensor in network.head.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("size", [(64, 96), (75, 52)])
@torch.no_grad()
def test_logits_equal_those_of_transformers(segmenter: SemanticSegmenter, size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers", reason="test-only dependency, the extra dev")
    tiny = transformers.ConvNextConfig(hidden_sizes=list(DIMS), depths=[1] * 4, out_indices=[1, 2, 3, 4])
    theirs = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=tiny, hidden_size=16, auxiliary_channels=8, num_labels=7)
    ).eval()
    theirs.backbone = nn.Identity()  # its maps are not compared
    weights = {renamed(k): v for k, v in segmenter.head.state_dict().items() if not k.startswith("norms.")}
    theirs.load_state_dict(weights)
    theirs.backbone = Backbone(segmenter)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    logits, auxiliary = segmenter.forward_with_auxiliary(image)
    assert torch.equal(logits, segmenter(image))
    full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, theirs(image).logits, rtol=0, atol=1e-5)
    maps = theirs.backbone.forward_with_filtered_kwargs(image).feature_maps
    torch.testing.assert_close(auxiliary, theirs.auxiliary_head(maps), rtol=0, atol=1e-5)
    assert logits.abs().max() > 1e-2
