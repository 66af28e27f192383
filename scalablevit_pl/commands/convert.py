"""`convert`: write a model's folder from a checkpoint of the authors' release."""

import sys
from pathlib import Path

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.data.imagenet import imagenet_names
from scalablevit_pl.models.conversion import convert_checkpoint
from scalablevit_pl.models.pretrained import card_subject, save_network
from scalablevit_pl.weights.card import Provenance, write_card
from scalablevit_pl.weights.folder import check_target
from scalablevit_pl.weights.hub.cache import checksum


def convert_reference(options: list[str]) -> None:
    """Run `scalablevit convert REFERENCE.pth FOLDER --model NAME|CONFIG.json`."""
    parser = OptionParser("convert")
    parser.add_argument("reference", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    check_target(arguments.folder, arguments.overwrite)
    model = convert_checkpoint(arguments.reference, arguments.model, imagenet_names())
    provenance = Provenance(
        license="other",
        note=f"The weights were converted from the file `{arguments.reference.name}` (sha256 "
        f"`{checksum(arguments.reference)}`), a checkpoint of the ScalableViT release of the paper's authors, who have "
        "published no licence for it.",
    )
    card = write_card(card_subject(model), arguments.folder.resolve().name, provenance)
    save_network(model, arguments.folder, card)
    tensors = len(model.state_dict())
    sys.stdout.write(f"{arguments.folder}: all {tensors} tensors of {arguments.reference} as {model.config['name']}\n")
