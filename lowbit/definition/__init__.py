"""The definition that every kernel has to equal bit for bit, step by step in PyTorch."""
