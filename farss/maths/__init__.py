"""Tensors in, tensors out: no model, file, log or configuration."""
