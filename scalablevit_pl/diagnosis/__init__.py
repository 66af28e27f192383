"""Checks before a long run: one file for each subject, and `examination` for their order."""
