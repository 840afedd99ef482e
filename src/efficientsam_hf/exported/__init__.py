"""Exported folders in the place of a model: read, verified and run by another runtime."""
