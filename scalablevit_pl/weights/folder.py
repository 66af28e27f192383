"""A model's folder, the same on disk and on the Hub: `model.safetensors`, `config.json` and `README.md`."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scalablevit_pl.preprocessing.records import Preprocessing, read_preprocessing, read_record
from scalablevit_pl.storage import folder_written_aside, save_json
from scalablevit_pl.text import one_line
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel, check_finite, checked_names

Value = TypeVar("Value")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
MULTI_LABEL = {"problem_type": "multi_label_classification"}  # as in the files of transformers
SCHEMA = 2  # 1 had no `task` and was for classifiers alone
ALIGNMENT = 64  # bytes, of the memory that torch allocates
# Entries of timm's description of a network that concern its images, and all that a file holds.
IMAGE_ENTRIES = ("input_size", "pool_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
TIMM_ENTRIES = (*IMAGE_ENTRIES, "num_classes", "first_conv", "classifier")
TIMM_PAIRS = ("input_size", "pool_size", "mean", "std")  # tuples, which JSON holds as lists


def is_model_folder(path: str | Path) -> bool:
    """Return whether a path is a folder that holds a model, or a part of one."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, CONFIG))


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target folder that holds anything, unless it is to be replaced.

    Raises:
        ValueError: If it holds files, or cannot be created.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        holds = "a model" if is_model_folder(folder) else "files"
        raise ValueError(
            f"{str(folder)!r} already holds {holds}: choose another folder, or replace them with --overwrite"
        )
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{str(folder)!r} cannot be created, {str(path)!r} is a file: choose another folder")


def write_folder(
    folder: str | Path,
    description: Description,
    tensors: Mapping[str, Tensor],
    card: str | None,
    pictures: Sequence[Path] = (),
) -> None:
    """Write a model's folder; existing files are replaced once all are written, other files stay.

    Args:
        folder: The folder; created if it does not exist.
        description: The network.
        tensors: Its weights, which keep their dtype.
        card: Text of `README.md`; None leaves that file as it is. A replaced card is kept as `README.md.old`.
        pictures: Files that the card shows.

    Raises:
        ValueError: If a weight is not finite.
        OSError: If the folder cannot be written; existing files stay.
    """
    folder = Path(folder)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(plain, "the model")
    with folder_written_aside(folder) as aside:
        # `save_file` gives others no permission to read the file, and raises no OSError when the disk is full.
        (aside / WEIGHTS).write_bytes(save(plain, metadata={"format": "pt"}))
        save_json(describe(description), aside / CONFIG)
        if card is not None:
            if (folder / CARD).is_file():
                shutil.copyfile(folder / CARD, aside / f"{CARD}.old")
            (aside / CARD).write_text(card, encoding="utf-8")
        for picture in pictures:
            shutil.copyfile(picture, aside / picture.name)


def describe(description: Description) -> dict[str, Any]:
    """Return the content of `config.json`.

    That of a classifier of this package has the entries of timm's files on the Hub, so that timm can read it.
    """
    config, names = description.config, description.class_names
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "task": description.task,
        "architecture": config.get("name") or description.network_class,
    }
    content |= {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    content |= MULTI_LABEL if description.multi_label else {}
    labels = {} if names is None else {"label_names": names}
    if description.task != CLASSIFICATION or description.network_class is not None:
        content |= labels | {"network_class": description.network_class, "config": config}
        return content | {"preprocessing": description.preprocessing and description.preprocessing.to_dict()}
    outer = {"head": config["head"], "global_pool": config["global_pool"]}
    cfg = {key: description.pretrained_cfg[key] for key in TIMM_ENTRIES if key in description.pretrained_cfg}
    return {
        **content,
        "num_features": config["backbone"]["embed_dims"][-1],
        **labels,
        "model_args": outer | config["backbone"],
        "pretrained_cfg": cfg | {"num_classes": config["num_classes"]},
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, after checking its schema."""
    path = folder / CONFIG
    if not path.is_file():
        missing = f"there is no folder {str(folder)!r}" if not folder.is_dir() else f"{str(folder)!r} has no {CONFIG}"
        raise ValueError(f"{missing}: give a folder with {WEIGHTS} and {CONFIG}, as `scalablevit export` writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged, it does not hold JSON: {error}") from error
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{str(path)!r} is not the {CONFIG} of a scalablevit_pl model: it has no schema")
    if schema > SCHEMA:
        raise ValueError(
            f"{str(path)!r} has schema {schema} and this version of scalablevit_pl reads up to {SCHEMA}: update it"
        )
    return dict(config)


def read_description(folder: Path) -> Description:
    """Read and check `config.json` without the weights.

    Raises:
        ValueError: If it is missing, damaged, of a newer schema, or describes no network.
    """
    content = read_config(folder)
    try:
        if content.get("task", CLASSIFICATION) == CLASSIFICATION and "network_class" not in content:
            return _read_classifier(content)
        return Description(
            task=_entry(content, "task", str),
            config=_entry(content, "config", dict),
            class_names=_read_labels(content),
            preprocessing=read_record(_entry(content, "preprocessing", dict)) if content.get("preprocessing") else None,
            network_class=content.get("network_class") and _entry(content, "network_class", str),
            multi_label=content.items() >= {"task": CLASSIFICATION, **MULTI_LABEL}.items(),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(folder / CONFIG)!r} describes no network that can be built: {one_line(error)}"
        ) from error


def read_folder(folder: str | Path, device: str | torch.device | None = None, prefix: str = "") -> StoredModel:
    """Read a model's folder. The weights are mapped into memory, not copied, where their alignment allows it.

    Args:
        folder: A folder with `model.safetensors` and `config.json`.
        device: Where the weights are loaded; by default the CPU.
        prefix: Read only the tensors whose names begin with it.

    Raises:
        ValueError: If a file is missing, damaged or of a newer schema, or a weight is not finite.
    """
    folder = Path(folder)
    description, path = read_description(folder), folder / WEIGHTS
    with _open(path, device) as file:
        tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    check_finite(tensors, repr(str(path)))
    return StoredModel(description, tensors, str(folder))


def count_parameters(folder: Path) -> int:
    """Count the numbers in the weights of a folder from the header of the file."""
    with _open(folder / WEIGHTS, None) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _aligned(tensor: Tensor) -> Tensor:
    """Copy a tensor whose memory begins where torch would not have allocated it: matrix products round differently."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def classifier_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the entries of a classifier's `config.json` into the `config` of its network."""
    arguments = dict(content["model_args"])
    outer = {key: arguments.pop(key) for key in ("head", "global_pool") if key in arguments}
    name = _entry(content, "architecture", str)
    return {"name": name, "num_classes": content["num_classes"], **outer, "backbone": arguments}


def _read_classifier(content: Mapping[str, Any]) -> Description:
    config, given = classifier_config(content), _entry(content, "pretrained_cfg", dict)
    cfg = {key: tuple(given[key]) if key in TIMM_PAIRS else given[key] for key in IMAGE_ENTRIES if key in given}
    names = _read_labels(content)
    cfg |= {"num_classes": config["num_classes"]} | ({} if names is None else {"label_names": names})
    defaults = Preprocessing()
    size = {"input_size": (3, defaults.input_size, defaults.input_size)}
    preprocessing = read_preprocessing(defaults.to_dict() | size | cfg, config["backbone"].get("in_channels", 3))
    multi_label = content.items() >= MULTI_LABEL.items()
    return Description(CLASSIFICATION, config, names, preprocessing, cfg, multi_label=multi_label)


def _read_labels(content: Mapping[str, Any]) -> list[str] | None:
    names = content.get("label_names")
    return None if names is None else checked_names(names, content.get("num_classes"))


def _entry(content: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    value = content[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is not a JSON {'object' if kind is dict else 'string'}")
    return value


def _open(path: Path, device: str | torch.device | None) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}: give a folder with {WEIGHTS} and {CONFIG}")
    try:
        return safe_open(path, framework="pt", device=str(device or "cpu"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is damaged, not a whole safetensors file: {one_line(error)}") from error
