"""`predict` on image files: run a trained network on them."""

import argparse
import io
import logging
import sys
from pathlib import Path

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks.evaluation import PredictionWriter
from scalablevit_pl.callbacks.progress import Progress
from scalablevit_pl.callbacks.throughput import Throughput
from scalablevit_pl.commands.arguments import OptionParser, check_output, check_output_folder
from scalablevit_pl.commands.console import fail
from scalablevit_pl.data.folders import find_images
from scalablevit_pl.data.images import ImageFiles, collate
from scalablevit_pl.models.factory import build_stored
from scalablevit_pl.tasks import TASKS, MultiLabelTask, ReportData
from scalablevit_pl.text import visible
from scalablevit_pl.weights.source import load_weights, pin_weights, weights_path

logger = logging.getLogger(__name__)

ROWS_AT_ONCE, MASKS_AT_ONCE = 32, 4  # images in a batch; those of a segmenter are larger


def predict_files(options: list[str]) -> int:
    """Run `scalablevit predict --weights PATH IMAGE|FOLDER …` and return 1 if some of the images cannot be read."""
    arguments = _parse(options)
    paths = find_images(arguments.images)
    weights = pin_weights(arguments.weights)
    stored = load_weights(weights, arguments.average)
    network = build_stored(stored)
    kind = MultiLabelTask if stored.description.multi_label else TASKS[stored.description.task]
    task = kind(network, tta=arguments.tta)
    preprocessing = getattr(network, "preprocessing", stored.preprocessing)  # networks of timm have none
    data = ReportData(stored.class_names, len(paths), preprocessing)
    in_folder = task.report(data, predict=True).folder is not None
    if arguments.overlay and not in_folder:
        raise ValueError("--overlay draws masks over images, and this network predicts none: omit it")
    if arguments.out is not None:
        check = check_output_folder if in_folder else check_output
        check("--out", arguments.out, inputs=[*paths, weights_path(weights)])
    batch_size = arguments.batch_size or (MASKS_AT_ONCE if in_folder else ROWS_AT_ONCE)
    shown = io.StringIO(newline=None) if arguments.out is None and sys.stdout.isatty() else None
    writer = PredictionWriter(arguments.out or shown or sys.stdout, data, arguments.overlay)
    loader = DataLoader(
        ImageFiles(paths, preprocessing, arguments.strict),
        batch_size=batch_size,
        num_workers=min(arguments.num_workers, len(paths) // batch_size),
        collate_fn=collate,
    )
    trainer = pl.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Progress(Throughput()), writer],
    )
    trainer.predict(task, loader, return_predictions=False)
    if shown is not None:  # a terminal
        sys.stdout.write(visible(shown.getvalue()))
    if not writer.unreadable:
        return 0
    for line in writer.unreadable:
        logger.error(line)
    fail(f"{len(writer.unreadable)} of {len(paths)} images cannot be read and have no row")
    return 1


def _parse(options: list[str]) -> argparse.Namespace:
    parser = OptionParser("predict")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--average", choices=["ema", "none"])
    parser.add_argument("--tta", choices=["flip", "multiscale"])
    parser.add_argument("--overlay", action="store_true")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    arguments = parser.read(options)
    if (arguments.batch_size is not None and arguments.batch_size < 1) or arguments.num_workers < 0:
        raise ValueError(
            f"need --batch_size ≥ 1 and --num_workers ≥ 0, got {arguments.batch_size} and {arguments.num_workers}"
        )
    return arguments
