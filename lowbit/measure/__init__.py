"""Measurements of what a recipe does."""
