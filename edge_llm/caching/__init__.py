"""Files that make later processes faster, and that may be lost at any time."""
