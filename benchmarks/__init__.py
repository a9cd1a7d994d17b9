"""One program per question: ``python -m benchmarks.NAME``, or ``python benchmarks/NAME.py``."""
