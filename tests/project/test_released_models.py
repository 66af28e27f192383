"""The released weights and the statements of their cards."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from scalablevit_pl import from_pretrained
from scalablevit_pl.data import ClassificationDataModule

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/config.json"))


def test_there_are_released_weights() -> None:
    assert [folder.name for folder in FOLDERS] == ["scalablevit_nano.fashion_mnist"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_released_folder_is_complete_and_small(folder: Path) -> None:
    assert {"README.md", "config.json", "curves.png", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    card = ModelCard.load(folder / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Top-1 accuracy on 10000 images"] >= 0.93
    assert card.data.license == "apache-2.0"
    text = (folder / "README.md").read_text()
    for words in ("scalablevit fit --config recipes/fashion_mnist.yaml", "seed", "curves.png", "scalablevit test"):
        assert words in text
    assert f"{results['Top-1 accuracy on 10000 images']:.4f}" in (ROOT / "checkpoints/README.md").read_text()


# Digests of the released files, which loading does not change. Update them only for a change on purpose.
DIGESTS = {
    "model.safetensors": "fb33c60e3533fa3f2469f54e26d3a5c9d2861a3e81b556af47e86621969663cc",
    "config.json": "4d5168026bae1ad4baaa7ad24c490a6179ba4ede5e6e554be7a93918389214d9",
    "README.md": "92a95a12bf1ea29bdc76302054e7c8db397fa4f19b8b2702934f19ae4f49d8b3",
}


def test_the_fashion_mnist_weights_classify_the_samples_test_images() -> None:
    folder = ROOT / "checkpoints/scalablevit_nano.fashion_mnist"
    model = from_pretrained(folder)
    data = ClassificationDataModule(
        "fashion_mnist_sample", batch_size=250, num_workers=0, preprocessing=model.preprocessing
    )
    data.setup("test")
    assert data.class_names == model.class_names
    right = total = 0
    with torch.inference_mode():
        for batch in data.test_dataloader():
            batch = data.on_after_batch_transfer(batch, 0)
            right += int((model(batch["image"]).argmax(dim=1) == batch["label"]).sum())
            total += len(batch["label"])
    # 2,000 of the 10,000 images of the card.
    assert total == 2000
    assert right / total == pytest.approx(0.93, abs=0.015)
    assert {name: sha256((folder / name).read_bytes()).hexdigest() for name in DIGESTS} == DIGESTS
