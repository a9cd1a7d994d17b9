"""Small language models that answer at once on your own CPU."""
