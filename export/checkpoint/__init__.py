"""Where a checkpoint comes from and how its files are read."""
