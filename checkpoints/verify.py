"""Compare the results of a test of a released model with the model's card.

python checkpoints/verify.py FOLDER TEST.json
"""

import json
import sys
from pathlib import Path

from huggingface_hub import ModelCard


def main(folder: Path, report: Path) -> int:
    """Return 0 if top-1 and the number of images match the card, else 1."""
    measured = json.loads(report.read_text(encoding="utf-8"))
    top1, samples = measured["test/top1"], int(measured["test/samples"])
    results = ModelCard.load(folder / "README.md").data.eval_results
    stated = next(result for result in results if str(result.metric_name).startswith("Top-1"))
    # Other processors and versions round differently, which may change the class of an image or two.
    same = abs(top1 - stated.metric_value) <= 2.5 / samples and f"{samples} images" in stated.metric_name
    sys.stdout.write(
        f"{folder}: top-1 {top1:.4f} on {samples:,} images, the card states {stated.metric_value:.4f} "
        f"({stated.metric_name}): {'verified' if same else 'NOT THE SAME'}\n"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
