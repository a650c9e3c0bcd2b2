"""Masked autoencoders in one to three spatial axes: model, tile store, training loop. Knows no file format of others."""
