"""Checkpoints of runs: find them, read them without running code, and return the network's description and weights."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalablevit_pl.preprocessing.records import read_record
from scalablevit_pl.text import one_line
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel, checked_names

RECORD_KEY = "scalablevit_pl"
SCHEMA = 1
AVERAGED = "ema_state_dict"
COMPILED = "_orig_mod."  # which `torch.compile(module)` inserts into names
TIMM_FACTORY = "timm.create_model"


def find_checkpoint(weights: str | Path, names: Sequence[str] = ("best", "last")) -> Path:
    """Return a checkpoint: the file itself, or the first existing one of some names in a run folder.

    Raises:
        ValueError: If there is none, or a URL is given.
    """
    if "://" in str(weights):
        raise ValueError(f"{str(weights)!r} is a URL: download the file from a source you trust and give its path")
    path = Path(weights)
    if path.is_file():
        return path
    for name in names:
        if (path / "checkpoints" / f"{name}.ckpt").is_file():
            return path / "checkpoints" / f"{name}.ckpt"
    named = Path("runs") / path
    if (path / "config.yaml").is_file():
        raise ValueError(f"{str(path)!r} is a run without a checkpoint yet: wait for the end of its first epoch")
    raise ValueError(
        f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoints/best.ckpt or checkpoints/last.ckpt: "
        + (f"did you mean {str(named)!r}?" if named.is_dir() else "check the path")
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, tensors and plain values only.

    Raises:
        ValueError: If the file is damaged, holds anything else, or is not a checkpoint of this package.
    """
    checkpoint = load_pickle(path)
    record = checkpoint.get(RECORD_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "state_dict" not in checkpoint:
        raise ValueError(f"{str(path)!r} is not a checkpoint of a scalablevit_pl run of schema {SCHEMA}")
    return dict(checkpoint)


def load_pickle(path: Path) -> Any:
    """Read a file of `torch.save` without running code in it.

    Raises:
        ValueError: If it is damaged, or holds other objects than tensors, plain values and torch's safe globals.
    """
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None  # torch ignores checksums
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # before torch refuses a TorchScript file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not a pickle make the reader raise almost anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        # torch refuses TorchScript and tar files with the advice to load them unsafely.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it is damaged, or holds code or other objects than tensors and plain values"
        raise ValueError(f"cannot read {str(path)!r} as a checkpoint: {reason}") from error


def read_run(weights: str | Path, average: str | None = None) -> StoredModel:
    """Read the network's description and weights from a run folder or a checkpoint.

    Args:
        weights: The run folder or the checkpoint.
        average: `ema` for the weights averaged over the training, `none` for the raw ones; by default the averaged ones
            if there are any.

    Raises:
        ValueError: If there is no such checkpoint, it lacks these weights, or its record is incomplete.
    """
    path = find_checkpoint(weights)
    return stored_model(read_checkpoint(path), str(path), average)


def stored_model(checkpoint: Mapping[str, Any], source: str, average: str | None = None) -> StoredModel:
    """Return the network's description and weights in a checkpoint; arguments and errors are those of `read_run`."""
    average = average or ("ema" if AVERAGED in checkpoint else "none")
    section = AVERAGED if average == "ema" else "state_dict"
    if section not in checkpoint:
        raise ValueError(f"{source!r} holds no averaged weights: use the raw ones with --average none")
    try:
        description = _description(checkpoint[RECORD_KEY])
        weights = {key: tensor for key, tensor in checkpoint[section].items() if key.startswith("network.")}
        tensors = {key.removeprefix("network.").replace(COMPILED, ""): tensor for key, tensor in weights.items()}
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{source!r} describes no network that can be rebuilt: {reason}") from error
    return StoredModel(description, tensors, source, average)


def _description(record: Mapping[str, Any]) -> Description:
    config, names = record["network"], record["class_names"]
    if config is None:
        raise ValueError("its network has no description in plain values: use it with its --config instead")
    classes = config.get("num_classes", config.get("init_args", {}).get("num_classes", len(names)))
    return Description(
        task=record.get("task", CLASSIFICATION),
        config=dict(config),
        class_names=checked_names(names, classes),
        preprocessing=read_record(record["preprocessing"]),
        network_class=record.get("network_class"),
        multi_label=record.get("multi_label") is True,
    )


def describe_network(network: nn.Module, section: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Describe a network in plain values: by its own `config`, or by the section of a configuration that built it."""
    config = getattr(network, "config", None)
    if isinstance(config, dict):
        return config
    if not section or section.get("class_path") != TIMM_FACTORY:
        return None
    # A configuration separates the arguments that timm forwards to the network.
    return {"class_path": TIMM_FACTORY, "init_args": {**section["init_args"], **section.get("dict_kwargs", {})}}
