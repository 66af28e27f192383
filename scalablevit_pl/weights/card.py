"""The card of a model: what it is, how it was trained, how well it performs, its licence, and how to load it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from scalablevit_pl.text import listed, one_line
from scalablevit_pl.weights.hub.client import is_repository
from scalablevit_pl.weights.stored import CLASSIFICATION, Description

PAPER = "2203.10790"
PIPELINES = {"semantic-segmentation": "image-segmentation"}  # tasks that the Hub's model pages file elsewhere
SHOWN_LABELS = 20
MAX_METADATA, MAX_DEPTH = 100_000, 20  # characters and levels of metadata that are read
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class CardSubject:
    """The network that a card describes."""

    description: Description
    parameters: int
    dtype: str  # of the weights, such as `float32`
    usage: str  # line of Python that uses the loaded `model`
    multiply_adds: str = ""  # for one image, in words; empty if unknown
    input_size: int = 0  # side in pixels of the image for which they were counted


class Score(NamedTuple):
    """A measured metric: its name for people, the Hub's name of such a metric, and the value."""

    label: str
    hub_type: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """A measurement, with what it takes to repeat it."""

    dataset: str  # name, or id on the Hub
    split: str
    samples: int
    scores: Sequence[Score]  # accuracies are fractions
    command: str
    revision: str | None = None  # of the data set
    pixels: int | None = None  # that were counted, if the metrics are of pixels


@dataclass(frozen=True)
class Provenance:
    """Origin of a model's weights; the card omits what is unknown."""

    license: str | None = None  # as the Hub spells it
    dataset: str | None = None  # name of the training data, or its id on the Hub
    command: str | None = None  # that trained the model
    settings: Mapping[str, Any] = field(default_factory=dict)  # the main ones, for a table
    config: Mapping[str, Any] | None = None  # of the whole training
    curves: str | None = None  # file name of the training curves beside the card
    evaluations: Sequence[Evaluation] = ()
    note: str | None = None  # paragraph on the origin of weights that no run trained


def parse_card(text: str) -> ModelCard:
    """Parse a card whose metadata are small and flat. Without aliases, which can stand for gigabytes, they stay so.

    Raises:
        ValueError: If they are not, or do not describe a model.
        yaml.YAMLError: If they are not YAML.
    """
    block = REGEX_YAML_BLOCK.search(text)
    metadata, depth = block[2] if block else "", 0
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"its metadata have {len(metadata):,} characters: {MAX_METADATA:,} are read")
    for event in yaml.parse(metadata, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"its metadata hold aliases or more than {MAX_DEPTH} levels")
    return ModelCard(text)


def write_card(subject: CardSubject, title: str, provenance: Provenance) -> str:
    """Write the text of `README.md`, which begins with the metadata that the Hub reads."""
    sections = [
        f"# {one_line(title)}",
        _introduction(subject.description, provenance),
        _usage(subject, title),
        _network_table(subject),
        _training(provenance),
        _results(provenance.evaluations),
        f"## Licence\n\n{_license(provenance)}",
    ]
    metadata = _metadata(subject.description, title, provenance)
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _metadata(description: Description, title: str, provenance: Provenance) -> str:
    task = PIPELINES.get(description.task, description.task)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=_slug(evaluation.dataset),
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            dataset_revision=evaluation.revision,
            metric_type=score.hub_type,
            metric_name=f"{score.label[:1].upper()}{score.label[1:]} on {_counted(evaluation)}",
            metric_value=round(score.value, 6),
        )
        for evaluation in provenance.evaluations
        for score in evaluation.scores
    ]
    data = ModelCardData(
        license=provenance.license,
        library_name="scalablevit_pl",
        pipeline_tag=task,
        tags=[description.task, *([] if _timm_name(description) else ["scalablevit", f"arxiv:{PAPER}"]), "safetensors"],
        datasets=[_slug(provenance.dataset)] if provenance.dataset else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _counted(evaluation: Evaluation) -> str:
    images = f"{evaluation.samples} images"
    return images if evaluation.pixels is None else f"{images} ({evaluation.pixels} pixels)"


def _slug(dataset: str) -> str:
    """Spell a data set's name as the Hub's metadata requires: an id, or letters, digits and signs."""
    if is_repository(dataset):
        return dataset
    return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in dataset).strip("-.") or "unknown"


def _introduction(description: Description, provenance: Provenance) -> str:
    task = description.task.replace("-", " ")
    kind = "An image classifier" if description.task == CLASSIFICATION else f"A network for {task}"
    kind += " with any number of labels for each image" if description.multi_label else ""
    name = f" (`{description.config['name']}`)" if "name" in description.config else ""
    architecture = f"with the architecture [ScalableViT](https://arxiv.org/abs/{PAPER}){name}"
    if _timm_name(description):
        architecture = f"on the backbone `{_timm_name(description)}` of timm"
    text = f"{kind} {architecture}, made with `scalablevit_pl`.{_labels(description)}"
    return text if provenance.note is None else f"{text}\n\n{provenance.note}"


def _timm_name(description: Description) -> str | None:
    backbone = description.config.get("backbone")
    return backbone.get("model_name") if isinstance(backbone, dict) else None


def _labels(description: Description) -> str:
    names, count = description.class_names, description.config.get("num_classes")
    if names is None:
        return "" if count is None else f" It has {count} classes."
    return f" It has {len(names)} classes: {listed(map(_plain, names), SHOWN_LABELS)}."


def _usage(subject: CardSubject, title: str) -> str:
    name = json.dumps(title, ensure_ascii=False)  # JSON strings are valid Python
    path = subject.description.network_class or ""
    module, _, kind = path.rpartition(".") if CLASS_PATH.fullmatch(path) else ("scalablevit_pl", "", "")
    loader = f"{kind}.from_pretrained" if kind else "from_pretrained"
    load = f"from {module} import {kind or loader}\n\nmodel = {loader}({name})  # this folder"
    return f"## Use\n\n```python\n{load}\n{subject.usage}\n```"


def _network_table(subject: CardSubject) -> str:
    rows = {"parameters": f"{subject.parameters:,}"}
    if subject.multiply_adds:
        rows[f"multiply-adds at {subject.input_size}×{subject.input_size}"] = subject.multiply_adds
    rows["weights"] = f"safetensors, {subject.dtype}"
    if subject.description.preprocessing is not None:
        rows |= subject.description.preprocessing.summary()
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
        parts.append(f"![Metrics and learning rate over the epochs]({provenance.curves})")
    if provenance.config is not None:
        text = yaml.safe_dump(dict(provenance.config), sort_keys=False, allow_unicode=True).strip()
        parts.append(f"<details>\n<summary>All settings</summary>\n\n```yaml\n{text}\n```\n\n</details>")
    return "\n\n".join(parts)


def _results(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    labels = list(dict.fromkeys(score.label for evaluation in evaluations for score in evaluation.scores))
    rows = []
    for evaluation in evaluations:
        values = {score.label: f"{score.value:.4f}" for score in evaluation.scores}
        cells = [values.get(label, "") for label in labels]
        counted = f"{evaluation.samples:,}"
        if evaluation.pixels is not None:
            counted += f" ({evaluation.pixels:,} pixels)"
        rows.append((f"{evaluation.dataset}, split `{evaluation.split}`", counted, *cells))
    commands = "\n".join(dict.fromkeys(evaluation.command for evaluation in evaluations))
    return f"## Results\n\n{_table(('data', 'images', *labels), rows)}\n\n```\n{commands}\n```"


def _license(provenance: Provenance) -> str:
    if provenance.license is None:
        return "No licence has been stated yet."
    return f"`{provenance.license}`" if provenance.license != "other" else "Other: see the origin of the weights above."


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plain(text: str) -> str:
    """Escape a label so that it stays text: on one line, without Markdown or HTML."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>#|~&!" else sign for sign in " ".join(text.split()))
