"""Tests that need a CUDA device: the numbers of its kernels, transforms on the device, training in bfloat16."""

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from golden.network import DATA, SIZES, TINY, build, fill, image
from safetensors.torch import load_file
from torch import Tensor, nn

from scalablevit_pl.data.transforms import erase
from scalablevit_pl.models import create_model
from scalablevit_pl.models.attention import InteractiveWindowSelfAttention, ScalableSelfAttention
from scalablevit_pl.models.kernels import LARGEST_BATCH
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.profiling.measurement import Plan, full_float32, measure
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.weights.reference import convert_reference_state_dict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    with full_float32():
        yield


@pytest.mark.parametrize("name", [*SIZES, *TINY])
@torch.no_grad()
def test_golden_numbers(name: str) -> None:
    model = build(name).eval()
    model.load_state_dict(convert_reference_state_dict(dict(fill(name))))
    expected = load_file(DATA / f"{name}_expected.safetensors")
    suffix, batch = ("", 2) if name in SIZES else ("_224x224", 1)
    maps = model.cuda().backbone(image(batch, 3, 224, 224).cuda())
    for actual, kind in ((model.head.pool(maps), "pooled"), (model.head(maps), "logits")):
        torch.testing.assert_close(actual.cpu(), expected[kind + suffix], rtol=0, atol=1e-5)


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    output = model(images)
    factors = torch.arange(output.numel()).view(output.shape).cos().to(output)  # 16-bit dtypes cannot count this far
    return [gradient.cpu() for gradient in torch.autograd.grad((output * factors).sum(), list(model.parameters()))]


@pytest.mark.parametrize("size", [(224, 224), (90, 141)])
def test_gradients_match_those_of_the_cpu(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, images = create_model("scalablevit_nano", num_classes=10).train(), torch.randn(2, 3, *size)
    expected = gradients(copy.deepcopy(model).double(), images.double())
    for actual, reference in zip(gradients(model.cuda(), images.cuda()), expected, strict=True):
        assert (actual - reference).norm() <= 1e-4 * reference.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_windows_than_a_grid_axis_allows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = InteractiveWindowSelfAttention(16, 2, window_size=2).to("cuda", dtype)
    tokens = torch.randn(2, 366, 366, 16, device="cuda", dtype=dtype, requires_grad=True)
    assert LARGEST_BATCH < 2 * 183**2
    whole = attention(tokens)
    (gradient,) = torch.autograd.grad(whole.float().square().sum(), [tokens])
    halves = tokens.detach().split(1)
    for index, half in enumerate(halves):
        half.requires_grad_()
        part = attention(half)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(part, whole[index : index + 1], rtol=tolerance, atol=tolerance)
        (expected,) = torch.autograd.grad(part.float().square().sum(), [half])
        torch.testing.assert_close(gradient[index : index + 1], expected, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize(
    "make", [lambda: ScalableSelfAttention(64, 2, 8, 1.25), lambda: InteractiveWindowSelfAttention(64, 2)]
)
def test_attention_in_bfloat16_is_close_to_float32(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    attention, tokens = make().cuda(), torch.randn(4, 56, 56, 64, device="cuda")
    expected = gradients(attention, tokens)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert attention(tokens).dtype == torch.bfloat16
        for actual, reference in zip(gradients(attention, tokens), expected, strict=True):
            assert (actual - reference).norm() <= 3e-2 * reference.norm() + 0.5


def test_images_are_normalized_and_erased_on_the_device() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    patches = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 8, 9, 5], [0, 0, 32, 32, 6], [1, 2, 8, 9, 5]])
    preprocessing = Preprocessing(32)
    expected = preprocessing.normalize(images)
    actual = preprocessing.normalize(images.cuda())
    torch.testing.assert_close(actual.cpu(), expected)
    erase(actual, patches)
    assert actual.is_cuda
    inside = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    for index, (top, left, height, width, _) in enumerate(patches.tolist()):
        inside[index, :, top : top + height, left : left + width] = True
    assert torch.equal(
        actual.cpu()[~inside.expand_as(images)], preprocessing.normalize(images.cuda()).cpu()[~inside.expand_as(images)]
    )
    assert torch.equal(actual[1, :, 1:9, 2:11], actual[3, :, 1:9, 2:11])
    noise = actual[2].cpu()
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_a_profile_measures_gpu_memory_and_time() -> None:
    settings = [Setting("scalablevit_nano", mode, "bf16", batch_size=16) for mode in ("inference", "train")]
    inference, training = measure(settings, torch.device("cuda"), Plan(3, 0.02))
    for result in (inference, training):
        assert not result.note
        assert 0 < result.fraction_of_matrix_rate < 1
    assert training.seconds.median > inference.seconds.median
    assert training.peak_memory > 4 * inference.peak_memory > 0


def test_a_fit_in_mixed_precision_learns(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "scalablevit_pl", "fit", "--config", "recipes/quickstart.yaml", "--run", "gpu"]
    options = {"precision": "bf16-mixed", "max_epochs": "2", "enable_progress_bar": "false", "accelerator": "gpu"}
    command += [part for name, value in options.items() for part in (f"--trainer.{name}", value)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "runs/gpu/metrics.csv").open(newline="") as file:
        scores = [float(row["val/top1"]) for row in csv.DictReader(file) if row["val/top1"]]
    assert scores[-1] > 0.4, scores
