"""Tasks as Lightning modules."""

from scalablevit_pl.tasks.base import BaseTask
from scalablevit_pl.tasks.classification import ClassificationTask, MultiLabelTask
from scalablevit_pl.tasks.report import MetricInfo, Report, ReportData
from scalablevit_pl.tasks.segmentation import SegmentationTask

# Tasks of this package by the Hub's name.
TASKS: dict[str, type[ClassificationTask | SegmentationTask]] = {
    "image-classification": ClassificationTask,
    "semantic-segmentation": SegmentationTask,
}

__all__ = [
    "TASKS",
    "BaseTask",
    "ClassificationTask",
    "MetricInfo",
    "MultiLabelTask",
    "Report",
    "ReportData",
    "SegmentationTask",
]
