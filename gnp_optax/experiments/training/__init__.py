"""A run: its steps, epochs and evaluation, and how it is kept on disk."""
