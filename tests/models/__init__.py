"""Losses, networks, a tiny comparison and the formula unshared: what several tests need."""
