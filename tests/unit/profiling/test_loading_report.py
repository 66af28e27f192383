from typing import Any

from scalablevit_pl.profiling.loader import STAGES
from scalablevit_pl.profiling.loading_report import report

SPREAD = {"median": 2.0, "minimum": 1.0, "maximum": 3.0}


def lines_of(rates: dict[str, Any]) -> list[str]:
    """Return the rows of the table, with single spaces."""
    record = {
        "date": "2026-11-26T00:00:00",
        "machine": {"cores": 2, "processor": "P", "device": "cpu"},
        "versions": dict.fromkeys(("torch", "torchvision", "timm", "pillow"), "1"),
        "settings": {"images": 1024, "mean_bytes": 31_450.0, "batch_size": 64, "rounds": 5},
        "images_per_second": [{"workers": 2, **rates}],
        "seconds_per_image": {stage: {name: value / 1e3 for name, value in SPREAD.items()} for stage in STAGES},
    }
    return [" ".join(line.split()) for line in report(record).splitlines()]


def test_the_table_has_images_per_second_and_milliseconds() -> None:
    ours = {"median": 1200.4, "minimum": 900.0, "maximum": 1300.0}
    lines = lines_of({"ours": ours, "theirs": SPREAD, "ratio": SPREAD})
    assert "1,024 images of 31.4 kB, batches of 64, 5 interleaved rounds" in lines
    assert "2 1,200 (900-1,300) 2 (1-3) 2.00 (1.00-3.00)" in lines
    assert "decode 2.00 (1.00-3.00)" in lines
    assert "all but transfer 10.00" in lines  # five stages


def test_a_missing_reference_is_a_dash() -> None:
    assert "2 2 (1-3) - -" in lines_of({"ours": SPREAD})
