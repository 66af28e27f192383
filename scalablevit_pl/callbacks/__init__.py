"""Callbacks that record, guard and measure a run."""
