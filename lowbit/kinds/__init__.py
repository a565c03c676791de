"""Kinds of element, scale and rule that a block format is made of, and how they are written."""
