"""Graphs of a model for other runtimes, checked before they are handed over."""
