"""`pull`: download a model from the Hugging Face Hub into a folder."""

import shutil
import sys
from pathlib import Path

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.models.factory import check_folder
from scalablevit_pl.storage import folder_written_aside
from scalablevit_pl.weights.folder import check_target
from scalablevit_pl.weights.hub.client import is_shared
from scalablevit_pl.weights.source import fetch_model


def pull_repository(options: list[str]) -> None:
    """Run `scalablevit pull OWNER/NAME FOLDER`."""
    parser = OptionParser("pull")
    parser.add_argument("repository")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--revision")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.read(options)
    check_target(arguments.folder, arguments.overwrite)
    snapshot = fetch_model(arguments.repository, arguments.revision, files=None)
    check_folder(snapshot.folder)
    with folder_written_aside(arguments.folder) as aside:
        for path in snapshot.folder.iterdir():
            if is_shared(path.name):
                shutil.copyfile(path, aside / path.name)
    sys.stdout.write(f"{arguments.folder}: {arguments.repository} at commit {snapshot.commit}\n")
