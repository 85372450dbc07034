"""Saved optimizers: safetensors files."""
