"""How long does a user wait before anything happens? Whole processes, medians, alternating.

    python benchmarks/startup.py

``import edge_llm`` is timed beside a Python that does nothing, and the difference is what the
import costs; ``edge-llm --help`` is timed as a whole, as a person waits for it. The last line of
stdout is a JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from edge_llm.cli.layout import table


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    script = Path(sysconfig.get_path("scripts")) / "edge-llm"
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import edge_llm": [sys.executable, "-c", "import edge_llm"],
        "edge-llm --help": [str(script), "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(1 + rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if round_:  # the first warms the page cache
                times[name].append((time.perf_counter() - started) * 1e3)
    medians = {name: statistics.median(found) for name, found in times.items()}
    bare = medians["python -c pass"]
    rows = [("", "ms", "beyond Python's own")]
    rows += [(name, f"{one:.0f}", f"{one - bare:.0f}") for name, one in medians.items()]
    print(table(rows))
    print(json.dumps({"benchmark": "startup", "rounds": rounds, "median_ms": medians}))


if __name__ == "__main__":
    main()
