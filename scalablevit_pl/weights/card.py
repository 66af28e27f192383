"""The card of a model: what it is, what it learnt from, how well it does, under which licence, and how to load it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from scalablevit_pl.models import ImageClassifier
from scalablevit_pl.profiling.cost import measure_cost
from scalablevit_pl.weights.hub import is_repository

PAPER = "2203.10790"
METRICS = {"top1": ("accuracy", "Top-1 accuracy"), "top5": ("accuracy", "Top-5 accuracy"), "loss": ("loss", "Loss")}
SHOWN_LABELS = 20


@dataclass(frozen=True)
class Evaluation:
    """A measurement, with what it takes to repeat it.

    Attributes:
        dataset: Name of the data set, or its id on the Hub.
        split: Name of the split.
        samples: How many images were counted.
        metrics: `top1` and `top5` as fractions, `loss`.
        command: What printed them.
        revision: The data set's revision, if it was given.
    """

    dataset: str
    split: str
    samples: int
    metrics: Mapping[str, float]
    command: str
    revision: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from; what is not known is left out of the card.

    Attributes:
        license: Identifier of the licence, as the Hub spells it.
        dataset: Name of the training data, or its id on the Hub.
        command: What trained the model.
        settings: Main settings of the training, for a table.
        config: The training's whole configuration.
        curves: Name of the picture of the training's curves beside the card.
        evaluations: How well the model does.
        note: A paragraph on the origin, for weights that were not trained by a run.
    """

    license: str | None = None
    dataset: str | None = None
    command: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    curves: str | None = None
    evaluations: Sequence[Evaluation] = ()
    note: str | None = None


def write_card(model: ImageClassifier, title: str, provenance: Provenance) -> str:
    """Write the text of `README.md`, with the metadata that the Hub reads at its head.

    Args:
        model: The classifier that the card describes.
        title: Name of the model.
        provenance: Where its weights come from.
    """
    sections = [
        f"# {_one_line(title)}",
        _introduction(model, provenance),
        _usage(title),
        _network_table(model),
        _training(provenance),
        _results(provenance.evaluations),
        f"## Licence\n\n{_license(provenance)}",
    ]
    return f"---\n{_metadata(title, provenance)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _metadata(title: str, provenance: Provenance) -> str:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_slug(evaluation.dataset),
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            dataset_revision=evaluation.revision,
            metric_type=METRICS[name][0],
            metric_name=f"{METRICS[name][1]} on {evaluation.samples} images",
            metric_value=round(value, 6),
        )
        for evaluation in provenance.evaluations
        for name, value in evaluation.metrics.items()
    ]
    data = ModelCardData(
        license=provenance.license,
        library_name="scalablevit_pl",
        pipeline_tag="image-classification",
        tags=["image-classification", "scalablevit", "safetensors", f"arxiv:{PAPER}"],
        datasets=[_slug(provenance.dataset)] if provenance.dataset else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _slug(dataset: str) -> str:
    """Spell a data set's name as the Hub's metadata wants it: an id, or letters, digits and signs."""
    if is_repository(dataset):
        return dataset
    return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in dataset).strip("-.") or "unknown"


def _introduction(model: ImageClassifier, provenance: Provenance) -> str:
    names = model.class_names
    labels = f"{model.num_classes} classes"
    if names is not None:
        shown = ", ".join(map(_plain, names[:SHOWN_LABELS]))
        labels += f": {shown}" + (f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else "")
    text = (
        f"An image classifier of the architecture [ScalableViT](https://arxiv.org/abs/{PAPER}) "
        f"(`{model.config['name']}`), made with `scalablevit_pl`. It knows {labels}."
    )
    return text if provenance.note is None else f"{text}\n\n{provenance.note}"


def _usage(title: str) -> str:
    name = json.dumps(title, ensure_ascii=False)  # which is how Python spells it, too
    return (
        "## Use\n\n```python\nfrom scalablevit_pl import from_pretrained\n\n"
        f"model = from_pretrained({name})  # this folder\n"
        'model.predict("photo.jpg")  # the most probable labels with their probabilities\n```'
    )


def _network_table(model: ImageClassifier) -> str:
    preprocessing = model.preprocessing
    cost = measure_cost(model.config, preprocessing.input_size)
    size = preprocessing.input_size
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    rows = {
        "parameters": f"{cost.parameters:,}",
        f"multiply-adds at {size}×{size}": f"{cost.multiply_adds / 1e9:.3f} G in convolutions and linear layers, "
        f"and {cost.attention_multiply_adds / 1e9:.3f} G in attention products",
        "weights": f"safetensors, {dtype}",
        "input": f"RGB, short side resized to {math.floor(size / preprocessing.crop_pct)} "
        f"({preprocessing.interpolation}), centre crop {size}×{size}",
        "mean, std": f"{_numbers(preprocessing.mean)}; {_numbers(preprocessing.std)} for pixels from 0 to 1",
    }
    return "## Network\n\n" + _table(("", ""), rows.items())


def _training(provenance: Provenance) -> str:
    if provenance.command is None and not provenance.settings:
        return ""
    parts = ["## Training"]
    if provenance.dataset:
        parts.append(f"Trained on {provenance.dataset}.")
    if provenance.command:
        parts.append(f"```\n{provenance.command}\n```")
    if provenance.settings:
        parts.append(_table(("setting", "value"), provenance.settings.items()))
    if provenance.curves is not None:
        parts.append(f"![Loss, accuracy and learning rate over the epochs]({provenance.curves})")
    if provenance.config is not None:
        text = yaml.safe_dump(dict(provenance.config), sort_keys=False, allow_unicode=True).strip()
        parts.append(f"<details>\n<summary>All settings</summary>\n\n```yaml\n{text}\n```\n\n</details>")
    return "\n\n".join(parts)


def _results(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    rows = [
        (
            f"{evaluation.dataset}, split `{evaluation.split}`",
            f"{evaluation.samples:,}",
            *(f"{evaluation.metrics[name]:.4f}" if name in evaluation.metrics else "" for name in METRICS),
        )
        for evaluation in evaluations
    ]
    commands = "\n".join(dict.fromkeys(evaluation.command for evaluation in evaluations))
    return "## Results\n\n" + _table(("data", "images", "top-1", "top-5", "loss"), rows) + f"\n\n```\n{commands}\n```"


def _license(provenance: Provenance) -> str:
    if provenance.license is None:
        return "None has been stated yet."
    return (
        f"`{provenance.license}`" if provenance.license != "other" else "Other: see above where the weights come from."
    )


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_one_line(str(cell)).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plain(text: str) -> str:
    """Write a label so that it stays text: on one line, with Markdown's signs and HTML's escaped."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>#|~&!" else sign for sign in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
