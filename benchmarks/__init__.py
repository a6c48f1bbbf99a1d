"""The thirteen benchmarks of the paper, one file for each of its groups."""
