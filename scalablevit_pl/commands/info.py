"""`info`: show the content of a model's folder, local or on the Hugging Face Hub."""

import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.models.factory import NETWORKS, is_known
from scalablevit_pl.models.loading import build_module
from scalablevit_pl.models.pretrained import card_subject
from scalablevit_pl.text import WIDTH, listed, one_line, visible
from scalablevit_pl.weights.card import parse_card
from scalablevit_pl.weights.folder import CARD, CONFIG, WEIGHTS, count_parameters, read_description
from scalablevit_pl.weights.hub.cache import checksum
from scalablevit_pl.weights.hub.client import HubUnreachableError, is_repository
from scalablevit_pl.weights.hub.download import count_remote_parameters
from scalablevit_pl.weights.source import fetch_model
from scalablevit_pl.weights.stored import Description, StoredModel

LENGTH = 2000  # of a value that is shown


def show_info(options: list[str]) -> None:
    """Run `scalablevit info FOLDER|OWNER/NAME`."""
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
    description = read_description(folder)
    rows = _describe(description, folder)
    if commit is not None and not is_known(description):
        with suppress(HubUnreachableError):  # the description is from the cache
            rows["parameters"] = f"{count_remote_parameters(snapshot, WEIGHTS):,}"
    rows |= _card_rows(folder / CARD) | {"commit": commit or "none: this is a local folder", "weights": digest}
    for name, value in rows.items():
        lines = textwrap.wrap(visible(value[:LENGTH]), WIDTH - 16) or [""]
        sys.stdout.write(f"{name:<16}" + ("\n" + " " * 16).join(lines) + "\n")


def _describe(description: Description, folder: Path) -> dict[str, str]:
    rows = {"task": description.task, "model": str(description.config.get("name") or description.network_class)}
    if is_known(description):
        rows |= _describe_network(description, folder)
    elif (folder / WEIGHTS).is_file():
        rows["parameters"] = f"{count_parameters(folder):,}"
    if description.preprocessing is not None:
        rows |= description.preprocessing.summary()
    names, count = description.class_names, description.config.get("num_classes")
    if names or count is not None:
        rows["labels"] = f"{count}: {listed(names, 20)}" if names else f"{count}, names unknown"
    return rows


def _describe_network(description: Description, folder: Path) -> dict[str, str]:
    stored = StoredModel(description, {}, str(folder / CONFIG))
    network: Any = build_module(lambda: NETWORKS[description.task].from_config(description.config), stored)
    network.annotate(description)
    subject = card_subject(network)
    size = subject.input_size
    return {
        "model": f"{description.config['name']}, head {description.config['head']}",
        "parameters": f"{subject.parameters:,}",
        "multiply-adds": f"at {size}×{size}: {subject.multiply_adds}",
    }


def _card_rows(path: Path) -> dict[str, str]:
    try:
        data = parse_card(path.read_text(encoding="utf-8")).data
        results = [
            f"{result.metric_name} of {result.dataset_name} ({result.dataset_split}): {result.metric_value}"
            for result in data.get("eval_results") or []
        ]
    except FileNotFoundError:
        return {"metrics": "none: there is no card"}
    except (AttributeError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        return {"metrics": f"unknown: the card cannot be read ({one_line(error)})"}
    return {"metrics": "; ".join(results) or "none in the card", "licence": str(data.get("license") or "none stated")}
