"""What the runs of a comparison show: the table and the figures."""
