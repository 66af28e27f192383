"""Heads: from a backbone's four maps to a task's output."""
