"""Training: datasets, the loop, configuration, and the quickstart that puts them together."""
