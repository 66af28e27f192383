"""Tasks as Lightning modules."""

from scalablevit_pl.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
