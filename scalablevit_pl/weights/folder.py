"""A classifier in a folder: `model.safetensors`, `config.json` and `README.md`, the same on disk and on the Hub."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, build_classifier
from scalablevit_pl.preprocessing import Preprocessing, read_preprocessing
from scalablevit_pl.storage import folder_written_aside, save_json

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
SCHEMA = 1
# What the forward pass is computed of, which float8, say, is not; under safetensors' names.
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
ALIGNMENT = 64  # bytes, of torch's memory
MOST_BLOCKS = 1000  # more take longer to build than any network is worth
# Of timm's description of a network, those entries that say how images reach it and what its layers are called.
DESCRIPTION = (
    "input_size",
    "pool_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "first_conv",
    "classifier",
)


def is_model_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder that holds a model, or a part of one."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, CONFIG))


def save_model(model: ImageClassifier, folder: str | Path, card: str | None, pictures: Sequence[Path] = ()) -> None:
    """Write a classifier's folder; files of the same names are replaced once all are written, others stay.

    Args:
        model: The classifier; its weights keep their dtype.
        folder: Where to; made if need be.
        card: The text of `README.md`; without one the file stays as it is, and with one it is kept as `README.md.old`.
        pictures: Files that the card shows.

    Raises:
        ValueError: If a weight is not finite, or the network was pruned.
        OSError: If the folder cannot be written; what stood there stays.
    """
    folder = Path(folder)
    check_whole(model)
    # Parts that `torch.compile` has wrapped are saved under their plain names.
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    check_finite(tensors, "the model")
    with folder_written_aside(folder) as aside:
        write_tensors(tensors, aside / WEIGHTS)
        save_json(describe_model(model), aside / CONFIG)
        if card is not None:
            if (folder / CARD).is_file():
                shutil.copyfile(folder / CARD, aside / f"{CARD}.old")
            (aside / CARD).write_text(card, encoding="utf-8")
        for picture in pictures:
            shutil.copyfile(picture, aside / picture.name)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that can be mapped into memory and computes what its tensors compute now.

    Matrix products round in another way where a matrix begins at an address that torch would not have given it. The
    library writes tensors wherever the one before ends; here those of odd sizes, mere biases, stand behind the others.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": FLOATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def check_whole(model: ImageClassifier) -> None:
    """Refuse a network that nothing describes.

    Raises:
        ValueError: If the network was pruned.
    """
    if not model.config:
        raise ValueError("a pruned network has no description from which it could be rebuilt: save the whole one")


def describe_model(model: ImageClassifier) -> dict[str, Any]:
    """Return the content of `config.json`: what it takes to rebuild and use the classifier, in plain values.

    The names are those of timm's files on the Hub, so that timm reads them, too.
    """
    config, cfg = model.config, model.pretrained_cfg
    arguments = {"head": config["head"], "global_pool": config["global_pool"], **config["backbone"]}
    labels = {} if model.class_names is None else {"label_names": model.class_names}
    return {
        "schema": SCHEMA,
        "architecture": config["name"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **labels,
        "model_args": arguments,
        "pretrained_cfg": {key: cfg[key] for key in DESCRIPTION if key in cfg} | {"num_classes": model.num_classes},
    }


def annotate(model: ImageClassifier, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
    """Let a classifier know the names of its classes and what its images have to go through."""
    size = (model.config["backbone"]["in_channels"], preprocessing.input_size, preprocessing.input_size)
    values = preprocessing.to_dict() | {"input_size": size, "mean": preprocessing.mean, "std": preprocessing.std}
    pool_size = (-(-size[1] // 32),) * 2  # of the last map
    model.pretrained_cfg.update(
        values | {"pool_size": pool_size, "crop_mode": "center", "label_names": list(class_names)}
    )


def load_model(
    folder: str | Path,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ImageClassifier:
    """Load the classifier of a folder, strictly: each tensor of the network is in the file, and no other.

    The weights are mapped into memory, not copied, and the network is built around them.

    Args:
        folder: A folder with `model.safetensors` and `config.json`.
        num_classes: Another number of classes than the folder's gives the network a new, random last layer.
        device: Where the weights shall be; by default the CPU.
        dtype: What they shall be converted to; by default they stay as they are.

    Returns:
        The classifier in eval mode.

    Raises:
        ValueError: If a file is missing, damaged, of a newer schema or does not fit the other one, or a weight is not
            finite; it names the file and the tensor.
    """
    model = _load(Path(folder), "", device, dtype)
    if num_classes is not None and num_classes != model.num_classes:
        before = model.num_classes
        model.reset_classifier(num_classes)
        if num_classes:
            logger.warning(
                "the last layer is new and random: it has %d outputs instead of the %d of %s",
                num_classes,
                before,
                folder,
            )
    return model.eval()


def load_backbone(
    folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> ScalableViT:
    """Load the backbone of a folder's classifier, as strictly; arguments and errors are those of `load_model`."""
    return _load(Path(folder), "backbone.", device, dtype).backbone.eval()


def _load(folder: Path, prefix: str, device: str | torch.device | None, dtype: torch.dtype | None) -> ImageClassifier:
    """Build the classifier of a folder, and put the weights whose names begin with a prefix in their places."""
    config, path = read_config(folder), folder / WEIGHTS
    with _open(path, device) as file:
        names = list(file.keys())
        model = _build(config, folder / CONFIG, len(names))
        part = model.get_submodule(prefix.rstrip("."))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith(prefix)}
        _compare({prefix + name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}, shapes, path)
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in shapes}
    check_finite(tensors, repr(str(path)))
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    part.load_state_dict(tensors, assign=True)  # the mapped weights themselves, not a copy
    logger.info("%s: loaded %d of %d tensors of %s", folder, len(tensors), len(shapes), config["architecture"])
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        ValueError: If it is missing, no JSON, or of another schema.
    """
    path = folder / CONFIG
    if not path.is_file():
        missing = f"there is no folder {str(folder)!r}" if not folder.is_dir() else f"{str(folder)!r} has no {CONFIG}"
        raise ValueError(f"{missing}: give a folder with {WEIGHTS} and {CONFIG}, as `scalablevit export` writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged, it holds no JSON: {error}") from error
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{str(path)!r} is not the {CONFIG} of a scalablevit_pl model: it has no schema")
    if schema > SCHEMA:
        raise ValueError(
            f"{str(path)!r} has schema {schema} and this version of scalablevit_pl reads up to {SCHEMA}: update it"
        )
    return dict(config)


def network_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the entries of `config.json` that describe the network into an `ImageClassifier.config`.

    Raises:
        TypeError: If one has a type that the network would not notice before it computes.
    """
    arguments = dict(config["model_args"])
    outer = {key: arguments.pop(key) for key in ("head", "global_pool") if key in arguments}
    if not isinstance(config["architecture"], str) or not isinstance(arguments.get("window_size", 7), int):
        raise TypeError("architecture is no name, or window_size no whole number")
    return {"name": config["architecture"], "num_classes": config["num_classes"], **outer, "backbone": arguments}


def _build(config: Mapping[str, Any], path: Path, tensors: int) -> ImageClassifier:
    """Build the classifier of a configuration on the meta device, where nothing takes memory.

    Raises:
        ValueError: If the configuration describes none, or one of another depth than that number of tensors allows.
    """
    try:
        description = network_config(config)
        blocks = sum(description["backbone"]["depths"])
        if blocks > min(tensors, MOST_BLOCKS):  # a hostile depth would take for ever to build
            raise ValueError(f"it has {blocks} blocks, and {WEIGHTS} {tensors} tensors")
        with torch.device("meta"):
            model = build_classifier(description)
        model.pretrained_cfg.update(_checked_description(config, model))
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} describes no network that can be built: {_one_line(error)}") from error
    return model


def _checked_description(config: Mapping[str, Any], model: ImageClassifier) -> dict[str, Any]:
    """Take the preprocessing and the labels from a configuration, as far as they are what they should be."""
    given = config["pretrained_cfg"]
    if not isinstance(given, dict):
        raise TypeError("pretrained_cfg is no object")
    cfg = {key: given[key] for key in DESCRIPTION if key in given and key not in ("first_conv", "classifier")}
    for key in ("input_size", "pool_size", "mean", "std"):
        if key in cfg:
            cfg[key] = tuple(cfg[key])
    cfg["num_classes"] = model.num_classes
    read_preprocessing(model.pretrained_cfg | cfg)
    names = config.get("label_names")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("label_names is no list of names")
        if len(names) != model.num_classes:
            raise ValueError(f"it names {len(names)} classes for a network with {model.num_classes}")
        cfg["label_names"] = names
    return cfg


def _open(path: Path, device: str | torch.device | None) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}: give a folder with {WEIGHTS} and {CONFIG}")
    try:
        return safe_open(path, framework="pt", device=str(device or "cpu"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is damaged, no whole safetensors file: {_one_line(error)}") from error


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compare the names and shapes of a network's tensors with those in a file.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape.
    """
    wrong = [
        f"{name} {list(found[name])} in place of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("left over", sorted(found.keys() - expected.keys())),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors in {str(path)!r} are not those that its {CONFIG} describes: {'; '.join(problems)}"
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Look for weights that are not finite numbers.

    Raises:
        ValueError: If there is one; it names the tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name} of {source} is no plain tensor")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} of {source} holds {tensor.dtype} and not floating-point weights")
        # A sum tells at the speed of memory, except that half precision may overflow; then each number is looked at.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(
                f"{name} of {source} holds numbers that are not finite: take weights from before training failed"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
