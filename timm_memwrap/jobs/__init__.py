"""Jobs: what the commands do from end to end."""
