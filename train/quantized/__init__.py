"""Quantized models on disk, and the models that they compute."""
