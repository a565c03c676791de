"""Post-training quantization of a model, block by block."""
