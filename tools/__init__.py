"""Scripts that make what the project ships; nothing here is installed with it."""
