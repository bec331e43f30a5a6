"""Experiments: the comparison of heads and the benchmark of costs, which the tables of results are made with."""
