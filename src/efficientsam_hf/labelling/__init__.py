"""Masks for folders, shards and data sets of pictures, in the files that other tools read."""
