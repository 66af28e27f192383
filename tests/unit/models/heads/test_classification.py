"""Classification heads against their definition."""

import math

import pytest
import torch
from torch import Tensor, nn

from scalablevit_pl.models.heads.classification import LinearHead, MlpHead


def layer_norm(features: Tensor, norm: nn.Module) -> Tensor:
    centered = features - features.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
@torch.no_grad()
def test_heads_normalize_the_last_map_then_average_its_tokens(kind: type[LinearHead]) -> None:
    torch.manual_seed(0)
    head = kind((8, 8, 8, 12), 5).eval()
    for parameter in head.parameters():
        parameter.normal_(std=0.3)
    maps = [torch.randn(2, channels, 3, 2) for channels in (8, 8, 8, 12)]
    tokens = maps[-1].flatten(2).transpose(1, 2)
    features = pooled = layer_norm(tokens, head.norm).sum(1) / 6
    if isinstance(head, MlpHead):
        hidden = layer_norm(pooled @ head.hidden.weight.T + head.hidden.bias, head.hidden_norm)
        assert hidden.shape == (2, 4096)
        features = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(head.pool(maps), pooled)
    torch.testing.assert_close(head.pre_logits(head.pool(maps)), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(maps), features @ head.fc.weight.T + head.fc.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
@torch.no_grad()
def test_without_pooling_every_token_has_an_output(kind: type[LinearHead]) -> None:
    head = kind((8, 8, 8, 12), 5, "").eval()
    maps = [torch.randn(2, channels, 3, 2) for channels in (8, 8, 8, 12)]
    output = head(maps)
    assert output.shape == (2, 5, 3, 2)
    head.global_pool = "avg"
    for row, column in ((0, 0), (2, 1)):
        alone = head([*maps[:3], maps[3][:, :, row : row + 1, column : column + 1]])
        torch.testing.assert_close(output[:, :, row, column], alone)


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
@torch.no_grad()
def test_the_last_layer_can_be_left_out(kind: type[LinearHead]) -> None:
    head, maps = kind((8, 12), 5).eval(), [torch.randn(2, 8, 3, 2), torch.randn(2, 12, 3, 2)]
    hidden = head(maps, pre_logits=True)
    assert hidden.shape == (2, head.num_features)
    torch.testing.assert_close(head.fc(hidden), head(maps))
    assert torch.equal(kind((8, 12), 0).fc(hidden), hidden)
