"""What analyses work on: models, their tokenizers, text."""
