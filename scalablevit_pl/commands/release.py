"""The commands that make a model's folder, look into it, and bring it to the Hub and from there."""

import json
import logging
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.models import ImageClassifier, build_classifier
from scalablevit_pl.models.conversion import convert_checkpoint
from scalablevit_pl.preprocessing import read_preprocessing
from scalablevit_pl.profiling.cost import measure_cost
from scalablevit_pl.run_folder import CONFIG as RUN_CONFIG
from scalablevit_pl.storage import folder_written_aside
from scalablevit_pl.weights.card import Evaluation, Provenance, write_card
from scalablevit_pl.weights.checkpoint import RECORD_KEY, find_checkpoint, load_trained_classifier, read_checkpoint
from scalablevit_pl.weights.folder import (
    CARD,
    CONFIG,
    WEIGHTS,
    annotate,
    is_model_folder,
    load_model,
    network_config,
    read_config,
    save_model,
)
from scalablevit_pl.weights.hub import checksum, is_repository, is_shared, plan_push, push, repository_url
from scalablevit_pl.weights.source import fetch_model

logger = logging.getLogger(__name__)

WIDTH = 80
CURVES = "curves.png"


def export_run(options: list[str]) -> None:
    """Run `scalablevit export RUN|CHECKPOINT FOLDER`.

    Raises:
        ValueError: If there is no such checkpoint, its network is none of ours, or the folder holds a model.
    """
    parser = OptionParser("export")
    parser.add_argument("weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--average", choices=["ema", "none"])
    parser.add_argument("--license")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    _check_target(arguments.folder, arguments.overwrite)
    path = find_checkpoint(arguments.weights)
    trained = load_trained_classifier(path, arguments.average)
    if not isinstance(trained.network, ImageClassifier):
        raise ValueError(
            f"{str(path)!r} holds a {type(trained.network).__name__}: only ScalableViT classifiers are exported"
        )
    annotate(trained.network, trained.class_names, trained.preprocessing)
    kind = "averaged" if trained.average == "ema" else "raw"
    provenance = _provenance(path, arguments.license, kind)
    card = write_card(trained.network, arguments.folder.resolve().name, provenance)
    pictures = [path.resolve().parent.parent / provenance.curves] if provenance.curves else []
    save_model(trained.network, arguments.folder, card, pictures)
    sys.stdout.write(f"{arguments.folder}: {kind} weights of {path}\n")


def _provenance(path: Path, license: str | None, kind: str) -> Provenance:  # noqa: A002
    """Gather what a checkpoint and its run folder tell about the training."""
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD_KEY]
    folder = path.resolve().parent.parent
    in_run = (folder / RUN_CONFIG).is_file()
    config = {key: value for key, value in record["config"].items() if key != "run"}
    data = config.get("data", {}).get("init_args", {})
    reports = ("val.json", "test.json") if in_run else ()
    evaluations = [_evaluation(folder / name, path, checkpoint, kind) for name in reports]
    return Provenance(
        license=license,
        dataset=_public_name(str(data["dataset"])) if "dataset" in data else None,
        command=_public_command(record.get("command")),
        settings=_settings(config, checkpoint, kind),
        config=_published(config),
        curves=CURVES if in_run and (folder / CURVES).is_file() else None,
        evaluations=[evaluation for evaluation in evaluations if evaluation is not None],
    )


def _published(config: Any) -> Any:
    """Leave out of a configuration what is not set, and where this machine keeps its data."""
    if not isinstance(config, dict):
        return config
    published = {key: _published(value) for key, value in config.items() if value is not None}
    return {key: _public_name(value) if key in ("dataset", "weights") else value for key, value in published.items()}


def _public_command(command: str | None) -> str | None:
    """Leave out of a command where this machine keeps what it names."""
    if not command:
        return None
    return "\n".join(
        shlex.join(_public_path(word) for word in shlex.split(line)) for line in command.splitlines() if line
    )


def _public_path(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if value.startswith(("/", "~", "../")) else word


def _public_name(dataset: str) -> str:
    """Name a data set or weights without saying where they lie on this machine."""
    is_remote = is_repository(dataset.partition("@")[0]) and not Path(dataset).exists()
    return dataset if is_remote else Path(dataset).name


def _settings(config: dict[str, Any], checkpoint: dict[str, Any], kind: str) -> dict[str, Any]:
    """Choose from a run's configuration what a reader of its card looks for first."""
    task, data = (config.get(section, {}).get("init_args", {}) for section in ("model", "data"))
    optimizer, schedule = task.get("optimizer") or {}, task.get("schedule") or {}
    trainer, record = config.get("trainer", {}), checkpoint[RECORD_KEY]
    found = {
        "weights": kind,
        "started from": _public_name(config["weights"]) if config.get("weights") else None,
        "epochs, steps": f"{checkpoint.get('epoch', 0) + 1}, {checkpoint.get('global_step')}",
        "global batch": record.get("global_batch"),
        "optimizer": _described(optimizer),
        "base batch of the learning rate": task.get("base_batch_size"),
        "schedule": _described(schedule),
        "gradient clipping": trainer.get("gradient_clip_val"),
        "label smoothing": task.get("label_smoothing"),
        "frozen": task.get("freeze") or None,
        "layer decay": task.get("layer_decay") if task.get("layer_decay") != 1.0 else None,
        "augmentation": _described({"init_args": data.get("augmentation") or {}}) or "none",
        "precision": trainer.get("precision"),
        "seed": config.get("seed_everything"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _described(section: dict[str, Any]) -> str:
    arguments = ", ".join(
        f"{name} {value}" for name, value in (section.get("init_args") or {}).items() if value not in (None, False)
    )
    return " ".join(filter(None, [str(section.get("class_path", "")).rpartition(".")[2], arguments]))


def _evaluation(path: Path, weights: Path, checkpoint: dict[str, Any], kind: str) -> Evaluation | None:
    """Read what an evaluation of exactly these weights, raw or averaged, has left behind, if there was one."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    same_file = Path(report.get("checkpoint") or "").resolve() == weights.resolve()
    if not same_file or report.get("global_step") != checkpoint.get("global_step"):
        logger.warning("%s is not of %s as it is now: left out of the card", path, weights)
        return None
    part = path.stem if kind == "raw" else f"{path.stem}_ema"
    if f"{part}/samples" not in report:
        logger.warning("%s is not of the %s weights of %s: left out of the card", path, kind, weights)
        return None
    return Evaluation(
        dataset=_public_name(report["dataset"]),
        split=report["split"],
        samples=int(report[f"{part}/samples"]),
        metrics={name: report[f"{part}/{name}"] for name in ("top1", "top5", "loss")},
        command=_public_command(report.get("command")) or "",
        revision=report.get("revision"),
    )


def convert_reference(options: list[str]) -> None:
    """Run `scalablevit convert REFERENCE.pth FOLDER --model NAME|CONFIG.json`.

    Raises:
        ValueError: If the checkpoint cannot be read, or is not of that network, or the folder holds a model.
    """
    parser = OptionParser("convert")
    parser.add_argument("reference", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    _check_target(arguments.folder, arguments.overwrite)
    model = convert_checkpoint(arguments.reference, arguments.model)
    provenance = Provenance(
        license="other",
        note=f"The weights were converted from the file `{arguments.reference.name}` (sha256 "
        f"`{checksum(arguments.reference)}`), a checkpoint of the ScalableViT release of the paper's authors, who have "
        "published no licence for it.",
    )
    save_model(model, arguments.folder, write_card(model, arguments.folder.resolve().name, provenance))
    tensors = len(model.state_dict())
    sys.stdout.write(f"{arguments.folder}: all {tensors} tensors of {arguments.reference} as {model.config['name']}\n")


def push_folder(options: list[str]) -> None:
    """Run `scalablevit push FOLDER OWNER/NAME`.

    Raises:
        ValueError: If a check fails or the Hub refuses.
    """
    parser = OptionParser("push")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision")
    parser.add_argument("--license")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.read(options)
    chosen = {
        "check": load_model,
        "private": arguments.private,
        "revision": arguments.revision,
        "license": arguments.license,
    }
    if arguments.dry_run:
        plan = plan_push(arguments.folder, arguments.repository, **chosen)
        made = "" if plan.exists else f", a new {'private ' if arguments.private else ''}repository"
        lines = [f"would push to {plan.repository}, branch {plan.branch}{made}:"]
        lines += [f"  {name:<24} {size:>14,} bytes" for name, size in plan.files.items()]
        lines += [f"  {name:<24} is left out" for name in plan.left_out]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    pushed = push(arguments.folder, arguments.repository, **chosen)
    sys.stdout.write(f"{repository_url(pushed.repository)}\ncommit {pushed.commit}\n")


def pull_repository(options: list[str]) -> None:
    """Run `scalablevit pull OWNER/NAME FOLDER`.

    Raises:
        ValueError: If it cannot be downloaded or loaded, or the folder holds a model.
    """
    parser = OptionParser("pull")
    parser.add_argument("repository")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--revision")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    _check_target(arguments.folder, arguments.overwrite)
    snapshot = fetch_model(arguments.repository, arguments.revision, files=None)
    load_model(snapshot.folder)
    with folder_written_aside(arguments.folder) as aside:
        for path in snapshot.folder.iterdir():
            if is_shared(path.name):
                shutil.copyfile(path, aside / path.name)
    sys.stdout.write(f"{arguments.folder}: {arguments.repository} at commit {snapshot.commit}\n")


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything, unless it shall be replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        holds = "a model" if is_model_folder(folder) else "files"
        raise ValueError(
            f"{str(folder)!r} already holds {holds}: choose another folder, or replace them with --overwrite"
        )
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{str(folder)!r} cannot be made, {str(path)!r} is a file: choose another folder")


def show_info(options: list[str]) -> None:
    """Run `scalablevit info FOLDER|OWNER/NAME`.

    Raises:
        ValueError: If there is no such model.
    """
    parser = OptionParser("info")
    parser.add_argument("model")
    parser.add_argument("--revision")
    arguments = parser.read(options)
    commit, folder = None, Path(arguments.model)
    if not folder.is_dir() and is_repository(arguments.model):
        snapshot = fetch_model(arguments.model, arguments.revision, files=(CONFIG, CARD))
        commit, folder, digest = snapshot.commit, snapshot.folder, snapshot.digests.get(WEIGHTS, "")
    else:
        digest = checksum(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else "no weights"
    config = read_config(folder)
    try:
        rows = _describe(config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} describes no network that can be built: {error}") from error
    rows |= _card_rows(folder / CARD) | {"commit": commit or "none, this is a folder", "weights": digest}
    for name, value in rows.items():
        lines = textwrap.wrap(value, WIDTH - 16) or [""]
        sys.stdout.write(f"{name:<16}" + ("\n" + " " * 16).join(lines) + "\n")


def _describe(config: dict[str, Any]) -> dict[str, str]:
    description = network_config(config)
    with torch.device("meta"):
        build_classifier(description)
    preprocessing = read_preprocessing(config["pretrained_cfg"])
    size, names = preprocessing.input_size, config.get("label_names")
    cost = measure_cost(description, size)
    return {
        "model": f"{config['architecture']}, head {description['head']}",
        "parameters": f"{cost.parameters:,}",
        "multiply-adds": f"{cost.multiply_adds / 1e9:.3f} G at {size}×{size}, "
        f"and {cost.attention_multiply_adds / 1e9:.3f} G in attention products",
        "input": f"{size}×{size}, crop {preprocessing.crop_pct:g} of the short side, {preprocessing.interpolation}",
        "labels": f"{config['num_classes']}"
        + (f": {', '.join(names[:20])}" if names else ", names unknown")
        + (f" and {len(names) - 20} more" if names and len(names) > 20 else ""),
    }


def _card_rows(path: Path) -> dict[str, str]:
    """Read licence and metrics from a card, as far as there is one that can be read."""
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.debug("no card: %s", error)
        return {"metrics": "none, there is no card"}
    results = [
        f"{result.metric_name} of {result.dataset_name} ({result.dataset_split}): {result.metric_value}"
        for result in data.get("eval_results") or []
    ]
    return {"metrics": "; ".join(results) or "none in the card", "licence": str(data.get("license") or "none stated")}


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": export_run,
    "convert": convert_reference,
    "push": push_folder,
    "pull": pull_repository,
    "info": show_info,
}
