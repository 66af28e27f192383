"""Fit, validate, test and predict as Lightning's command line, in a run folder."""
