"""From float weights to blocks of small integers."""
