"""`push`: upload a model's folder to the Hugging Face Hub."""

import sys
from pathlib import Path

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.models.factory import check_folder
from scalablevit_pl.text import visible
from scalablevit_pl.weights.hub.client import repository_url
from scalablevit_pl.weights.hub.upload import plan_push, push


def push_folder(options: list[str]) -> None:
    """Run `scalablevit push FOLDER OWNER/NAME`."""
    parser = OptionParser("push")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision")
    parser.add_argument("--license")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.read(options)
    plan = plan_push(
        arguments.folder,
        arguments.repository,
        check=check_folder,
        private=arguments.private,
        branch=arguments.revision,
        license=arguments.license,
    )
    if arguments.dry_run:
        made = "" if plan.exists else f", a new {'private ' if arguments.private else ''}repository"
        lines = [f"would push to {plan.repository}, branch {plan.branch}{made}:"]
        lines += [f"  {name:<24} {size:>14,} bytes" for name, size in plan.files.items()]
        lines += [f"  {name:<24} is omitted" for name in plan.left_out]
        sys.stdout.write(visible("\n".join(lines) + "\n"))
        return
    pushed = push(plan)
    sys.stdout.write(f"{repository_url(pushed.repository)}\ncommit {pushed.commit}\n")
