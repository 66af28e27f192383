"""The card of a model, as the Hub and people read it."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from small_networks import annotate

from scalablevit_pl.models import ImageClassifier, create_model
from scalablevit_pl.models.cost import count_multiply_adds
from scalablevit_pl.models.pretrained import card_subject
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.card import CardSubject, Evaluation, Provenance, Score, write_card
from scalablevit_pl.weights.stored import Description

PREPROCESSING = Preprocessing(48, 0.8, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
TOP1 = Score("top-1 accuracy", "accuracy", 0.87654321)
SCORES = [TOP1, Score("top-5 accuracy", "accuracy", 0.99), Score("loss", "loss", 0.4321)]
VALIDATION = Evaluation("owner/cats", "validation", 1234, SCORES, "scalablevit test --run a")
TEST = Evaluation("My cats & dogs", "test", 56, [TOP1._replace(value=0.5)], "scalablevit test --run b", "v1.0")
PROVENANCE = Provenance(
    license="apache-2.0",
    dataset="owner/cats",
    command="scalablevit fit --config recipes/finetune.yaml --run a",
    settings={"epochs": 3, "augmentation": "mixup | cutmix", "note": "two\nlines"},
    config={"model": {"name": "nano"}, "labels": ["ü", "|"]},
    evaluations=[VALIDATION, TEST],
)


def classifier(labels: list[str], name: str = "scalablevit_nano", **options: Any) -> ImageClassifier:
    with torch.device("meta"):
        model = create_model(name, len(labels), **options)
    return annotate(model, labels, PREPROCESSING)


@functools.cache
def subject(labels: tuple[str, ...]) -> CardSubject:
    return card_subject(classifier(list(labels)))


def card(provenance: Provenance = PROVENANCE, labels: tuple[str, ...] = ("cat", "dog"), title: str = "cats") -> str:
    return write_card(subject(labels), title, provenance)


def table(text: str, heading: str) -> list[list[str]]:
    """Split a section's table into cells: a bar ends a cell unless it is escaped."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def headings(text: str) -> list[str]:
    outside = re.sub(r"```.*?```", "", text.partition("\n---\n")[2], flags=re.S)
    return [line for line in outside.splitlines() if line.startswith("#")]


def test_the_hub_reads_the_metadata() -> None:
    read = ModelCard(card())
    data = read.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0", "scalablevit_pl", "image-classification"
    )  # fmt: skip
    assert data.datasets == ["owner/cats"]
    assert data.model_name == "cats"
    assert {"image-classification", "scalablevit", "safetensors", "arxiv:2203.10790"} == set(data.tags)
    assert read.text.lstrip().startswith("# cats\n")


def test_the_hub_reads_the_results() -> None:
    results = ModelCard(card()).data.eval_results
    read = [
        (
            result.dataset_type,
            result.dataset_name,
            result.dataset_split,
            result.dataset_revision,
            result.metric_type,
            result.metric_name,
            result.metric_value,
        )
        for result in results
    ]
    cats = ("owner/cats", "owner/cats", "validation", None)
    assert sorted(read, key=str) == sorted(
        [
            (*cats, "accuracy", "Top-1 accuracy on 1234 images", 0.876543),
            (*cats, "accuracy", "Top-5 accuracy on 1234 images", 0.99),
            (*cats, "loss", "Loss on 1234 images", 0.4321),
            ("My-cats---dogs", "My cats & dogs", "test", "v1.0", "accuracy", "Top-1 accuracy on 56 images", 0.5),
        ],
        key=str,
    )
    assert {result.task_type for result in results} == {"image-classification"}


def test_people_read_the_results() -> None:
    rows = table(card(), "Results")
    assert rows[0] == ["data", "images", "top-1 accuracy", "top-5 accuracy", "loss"]
    assert rows[2] == ["owner/cats, split `validation`", "1,234", "0.8765", "0.9900", "0.4321"]
    assert rows[3] == ["My cats & dogs, split `test`", "56", "0.5000", "", ""]
    assert "```\nscalablevit test --run a\nscalablevit test --run b\n```" in card()
    assert card(Provenance(evaluations=[VALIDATION, VALIDATION])).count("scalablevit test --run a") == 1


@pytest.mark.parametrize(
    ("dataset", "slug"),
    [
        ("owner/name", "owner/name"),
        ("scalablevit_pl/data", "scalablevit_pl/data"),
        ("My cats & dogs", "My-cats---dogs"),
        ("/home/me/cats", "home-me-cats"),
        ("a/b/c", "a-b-c"),
        ("..", "unknown"),
        ("Fashion-MNIST 1.0", "Fashion-MNIST-1.0"),
    ],
)
def test_data_sets_are_spelled_as_the_hub_requires(dataset: str, slug: str) -> None:
    assert ModelCard(card(Provenance(dataset=dataset))).data.datasets == [slug]


@pytest.mark.parametrize(
    ("license", "stated"),
    [
        (None, "No licence has been stated yet."),
        ("other", "Other: see the origin of the weights above."),
        ("mit", "`mit`"),
    ],
)
def test_the_licence_or_its_absence_is_stated(license: str | None, stated: str) -> None:  # noqa: A002
    text = card(Provenance(license=license, note="Converted from the release."))
    assert text.partition("\n## Licence\n\n")[2].startswith(stated)
    assert ModelCard(text, ignore_metadata_errors=False).data.license == license
    assert ("license:" in text.split("---")[1]) is (license is not None)
    assert "\n\nConverted from the release.\n\n" in text


def test_unknown_facts_are_omitted() -> None:
    text = card(Provenance())
    assert headings(text) == ["# cats", "## Use", "## Network", "## Licence"]
    data = ModelCard(text).data
    assert (data.datasets, data.eval_results, data.model_name) == (None, None, None)
    assert "None" not in text.replace("No licence has been stated yet.", "")
    assert headings(card()) == ["# cats", "## Use", "## Network", "## Training", "## Results", "## Licence"]


def test_the_training_can_be_repeated() -> None:
    text = card()
    assert "Trained on owner/cats." in text
    assert f"```\n{PROVENANCE.command}\n```" in text
    rows = table(text, "Training")
    assert rows == [
        ["setting", "value"],
        ["---", "---"],
        ["epochs", "3"],
        ["augmentation", "mixup | cutmix"],
        ["note", "two lines"],
    ]
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1]) == PROVENANCE.config


STRANGE = (
    "a | b",
    "a \"quoted\" 'label'",
    "two\nlines",
    "\n\n## Licence\n\nall rights reserved",
    "\n---\nlicense: mit\n---\n",
    "*bold* _it_ `code` [x](https://example.org) <script>alert(1)</script> ![i](j) \\ ~~x~~ &lt;",
    "```\n",
    "Kröte 蛙",
    "",
)


def test_strange_labels_stay_text() -> None:
    text = card(Provenance(), STRANGE)
    plain = card(Provenance(), tuple("abcdefghi"))
    assert headings(text) == headings(plain)
    assert len(text.splitlines()) == len(plain.splitlines())
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    (line,) = [line for line in text.splitlines() if "It has 9 classes" in line]
    labels = line.partition("It has 9 classes: ")[2]
    assert re.findall(r"(?<!\\)[`*_<>|\[~&!]", labels) == []
    unescaped = re.sub(r"\\([\\`*_\[\]<>#|~&!])", r"\1", labels)
    assert unescaped == ", ".join(" ".join(label.split()) for label in STRANGE) + "."


def test_only_the_first_of_many_labels_are_shown() -> None:
    labels = tuple(f"label{index}" for index in range(1000))
    text = card(Provenance(), labels)
    assert "It has 1000 classes: label0, label1, " in text
    assert "label19 and 980 more." in text
    assert "label20" not in text
    assert len(text) < 3000
    assert "label19." in card(Provenance(), labels[:20])
    assert "label19 and 1 more." in card(Provenance(), labels[:21])


def test_without_labels_the_number_of_classes_is_stated() -> None:
    with torch.device("meta"):
        model = create_model("scalablevit_nano", 7)
    assert "It has 7 classes." in write_card(card_subject(model), "m", Provenance())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_s_numbers_are_those_of_its_cost(dtype: torch.dtype) -> None:
    model = classifier(["a", "b", "c"], "scalablevit_s")
    layers, products = count_multiply_adds(model, (3, 48, 48))
    rows = dict(table(write_card(card_subject(model.to(dtype)), "m", Provenance()), "Network"))
    assert rows["parameters"] == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    assert rows["multiply-adds at 48×48"] == (
        f"{layers / 1e9:.3f} G in convolutions and linear layers, and {products / 1e9:.3f} G in attention products"
    )
    assert rows["weights"] == f"safetensors, {str(dtype).removeprefix('torch.')}"
    assert rows["input"] == "RGB, short side resized to 60 (bilinear), center crop 48×48"
    assert rows["mean, std"] == "0.1, 0.2, 0.3; 0.4, 0.5, 0.6 for pixels from 0 to 1"


@pytest.mark.parametrize("title", ["cats", "my cats", 'a "quoted" name', "back\\slash", "Kröte"])
def test_the_code_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    torch.manual_seed(0)
    model = annotate(create_model("scalablevit_nano", 2).eval(), ["cat", "dog"], PREPROCESSING)
    model.save_pretrained(tmp_path / title)
    text = (tmp_path / title / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("model.predict(", "predictions = model.predict("), names)
    assert {label for label, _ in names["predictions"][0]} == {"cat", "dog"}
    assert torch.equal(names["model"].head.fc.weight, model.head.fc.weight)


def test_the_card_of_a_network_of_another_task_names_it_and_its_class() -> None:
    description = Description("semantic-segmentation", {"num_classes": 2}, network_class="own.module.Segmenter")
    text = write_card(CardSubject(description, 1000, "float32", "model(image)"), "m", PROVENANCE)
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-segmentation"
    assert {result.task_type for result in data.eval_results} == {"image-segmentation"}
    assert "A network for semantic segmentation with the architecture [ScalableViT]" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert code.splitlines() == [
        "from own.module import Segmenter",
        "",
        'model = Segmenter.from_pretrained("m")  # this folder',
        "model(image)",
    ]
    rows = dict(row for row in table(text, "Network") if len(row) == 2)
    assert (rows["parameters"], rows["weights"]) == ("1,000", "safetensors, float32")


@pytest.mark.parametrize("path", ["os; import evil", "Segmenter", "a.b\nimport evil", "", "a..b", "1.b", "a.b()"])
def test_a_class_name_that_is_not_a_path_stays_out_of_the_code(path: str) -> None:
    description = Description("semantic-segmentation", {}, network_class=path)
    text = write_card(CardSubject(description, 1, "float32", "model(image)"), "m", Provenance())
    assert "from scalablevit_pl import from_pretrained" in text
    assert "evil" not in text.partition("## Use")[2].partition("## Network")[0]


def test_metrics_of_pixels_state_their_number() -> None:
    miou = Score("mean IoU", "mean_iou", 0.5312)
    evaluation = Evaluation("scenes", "test", 1500, [miou], "scalablevit test --run a", pixels=4_608_000)
    text = card(Provenance(evaluations=[evaluation]))
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value) == ("mean_iou", 0.5312)
    assert result.metric_name == "Mean IoU on 1500 images (4608000 pixels)"
    assert "| scenes, split `test` | 1,500 (4,608,000 pixels) | 0.5312 |" in text
