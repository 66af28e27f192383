"""`export`: write the folder of a run's weights, with a card that states recipe and results."""

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from scalablevit_pl.callbacks.run_record import metric_record
from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.models.factory import build_stored, is_known
from scalablevit_pl.models.pretrained import card_subject
from scalablevit_pl.run_folder import CONFIG
from scalablevit_pl.tasks import ClassificationTask
from scalablevit_pl.weights.card import CardSubject, Evaluation, Provenance, Score, write_card
from scalablevit_pl.weights.checkpoint import RECORD_KEY, find_checkpoint, read_checkpoint, stored_model
from scalablevit_pl.weights.folder import check_target, write_folder
from scalablevit_pl.weights.hub.client import is_repository
from scalablevit_pl.weights.stored import Description, StoredModel

logger = logging.getLogger(__name__)

CURVES = "curves.png"


def export_run(options: list[str]) -> None:
    """Run `scalablevit export RUN|CHECKPOINT FOLDER`."""
    parser = OptionParser("export")
    parser.add_argument("weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--average", choices=["ema", "none"])
    parser.add_argument("--license")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    check_target(arguments.folder, arguments.overwrite)
    path = find_checkpoint(arguments.weights)
    checkpoint = read_checkpoint(path)
    stored = stored_model(checkpoint, str(path), arguments.average)
    description, subject = describe_stored(stored)
    kind = "averaged" if stored.average == "ema" else "raw"
    provenance = _provenance(path, checkpoint, arguments.license, kind)
    card = write_card(subject, arguments.folder.resolve().name, provenance)
    pictures = [path.resolve().parent.parent / provenance.curves] if provenance.curves else []
    write_folder(arguments.folder, description, stored.tensors, card, pictures)
    sys.stdout.write(f"{arguments.folder}: {kind} weights of {path}\n")


def describe_stored(stored: StoredModel) -> tuple[Description, CardSubject]:
    """Return the description to export, and the network as its card presents it.

    A network of a user's class is described by its own record, without importing that class.
    """
    description, source = stored.description, stored.source
    if "backbone" not in description.config:
        kind = description.config.get("init_args", {}).get("model_name", "another network")
        raise ValueError(f"{source!r} holds {kind}: only networks with a ScalableViT backbone can be exported")
    if is_known(description):
        network = build_stored(stored)
        return network.describe(), card_subject(network)
    parameters = sum(tensor.numel() for tensor in stored.tensors.values() if tensor.is_floating_point())
    dtype = str(next(iter(stored.tensors.values())).dtype).removeprefix("torch.")
    return description, CardSubject(description, parameters, dtype, 'model.predict("photo.jpg")')


def _provenance(path: Path, checkpoint: dict[str, Any], license: str | None, kind: str) -> Provenance:  # noqa: A002
    """Gather the facts about the training from a checkpoint and its run folder."""
    record = checkpoint[RECORD_KEY]
    folder = path.resolve().parent.parent
    in_run = (folder / CONFIG).is_file()
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
    """Omit unset values from a configuration, and the paths of this machine."""
    if not isinstance(config, dict):
        return config
    published = {key: _published(value) for key, value in config.items() if value is not None}
    return {key: _public_name(value) if key in ("dataset", "weights") else value for key, value in published.items()}


def _public_command(command: str | None) -> str | None:
    if not command:
        return None
    return "\n".join(
        shlex.join(_public_path(word) for word in shlex.split(line)) for line in command.splitlines() if line
    )


def _public_path(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if value.startswith(("/", "~", "../")) else word


def _public_name(dataset: str) -> str:
    """Name a data set or weights without their path on this machine."""
    is_remote = is_repository(dataset.partition("@")[0]) and not Path(dataset).exists()
    return dataset if is_remote else Path(dataset).name


def _settings(config: dict[str, Any], checkpoint: dict[str, Any], kind: str) -> dict[str, Any]:
    """Select the settings of a run that readers of its card look for first."""
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
    """Read the results of an evaluation of exactly these weights, raw or averaged, if there was one."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    same_file = Path(report.get("checkpoint") or "").resolve() == weights.resolve()
    if not same_file or report.get("global_step") != checkpoint.get("global_step"):
        logger.warning("%s is from other weights than %s: omitted from the card", path, weights)
        return None
    part = path.stem if kind == "raw" else f"{path.stem}_ema"
    if f"{part}/samples" not in report:
        logger.warning("%s has no results of the %s weights of %s: omitted from the card", path, kind, weights)
        return None
    return Evaluation(
        dataset=_public_name(report["dataset"]),
        split=report["split"],
        samples=int(report[f"{part}/samples"]),
        scores=_scores(report, part, checkpoint[RECORD_KEY]),
        command=_public_command(report.get("command")) or "",
        revision=report.get("revision"),
        pixels=int(report[f"{part}/pixels"]) if f"{part}/pixels" in report else None,
    )


def _scores(report: dict[str, Any], part: str, record: dict[str, Any]) -> list[Score]:
    """Select the described metrics of an evaluation, the monitored one first and the loss last."""
    metrics = record.get("metrics") or metric_record(ClassificationTask)  # runs of version 0.1 were classifiers
    names = sorted(metrics["described"], key=lambda name: (name == "loss", name != metrics["monitor"]))
    infos = {name: metrics["described"][name] for name in names if f"{part}/{name}" in report}
    return [Score(info["label"], info["hub_type"], report[f"{part}/{name}"]) for name, info in infos.items()]
