"""Export the built-in model into the runtime: `python -m edge_llm_export.builtin.bundle`.

int8 in blocks of 32, nearest to the checkpoint: a model this small has no megabytes to save.
int4 answers as many held-out requests in half the size (`benchmarks/builtin.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..pipeline import export_model
from .train import CHECKPOINT

__all__ = ["BLOCK", "MAX_CONTEXT", "QUANTIZE", "export_builtin"]

QUANTIZE = "int8"
BLOCK = 32
# Requests are a sentence long. Tables and cache for more would cost memory that nobody uses.
MAX_CONTEXT = 512


def export_builtin(folder: Path) -> None:
    """Write the bundle, in place of the one that is there."""
    export_model(
        CHECKPOINT, folder, quantize=QUANTIZE, block=BLOCK, max_context=MAX_CONTEXT, overwrite=True
    )


def main() -> None:
    """Export to where the runtime looks for it, or elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[2] / "edge_llm" / "builtin" / "bundle"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    export_builtin(parser.parse_args().folder)


if __name__ == "__main__":
    main()
