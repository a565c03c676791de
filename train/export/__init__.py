"""Quantized models as files that other people's engines load."""
