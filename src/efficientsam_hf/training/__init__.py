"""Parts of the training recipes: what can be wrong without crashing. The loops are in `examples/`."""
