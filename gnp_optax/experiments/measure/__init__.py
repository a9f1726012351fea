"""Measurements beside the comparison: costs, precision, throughput."""
