"""Replays of request cases: `python -m tests.serving FILE...`."""
