"""Checkpoints: reading, key maps, strict loading."""
