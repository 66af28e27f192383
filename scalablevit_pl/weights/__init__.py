"""Weights on disk and on the Hub: plain values and tensors, no network."""
