"""Configuration as plain data: strict YAML, formats by name."""
