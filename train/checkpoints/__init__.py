"""Checkpoints that are complete or not there, whole or in shards."""
