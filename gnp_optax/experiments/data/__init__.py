"""Data sets, and which of their examples a run has."""
