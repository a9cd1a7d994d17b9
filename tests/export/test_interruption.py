"""A calibrated export that is killed, again and again, and run once more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edge_llm_export import Calibration, export_model
from edge_llm_export.quantize.text import ROWS

# Two groups of windows, so that the first is kept when the second is interrupted.
CALIBRATION = Calibration(samples=ROWS + 2, tokens=24, seed=3)

# The report, counted within its phase, in which each child is killed; the last one comes through.
ENDS = [("calibrating", 1), ("calibrating", 3), ("writing", 7), ("verifying", 1), ("verifying", 2)]
KILLS = {
    "gptq": [("writing", 3), ("drawing", 9), ("drawing", 30), ("drawing", 1), *ENDS],
    "auto": [("drawing", 9), ("trying storages", 2), ("measuring mixes", 2), *ENDS],
}
OPTIONS: dict[str, dict[str, Any]] = {"gptq": {"method": "gptq"}, "auto": {"quantize": "auto"}}

# SIGKILL lets nobody clean up. The parent imports once and starts no thread: its forks are whole.
PARENT = """
import json, os, signal, sys
from edge_llm_export import Calibration, export_model
import edge_llm_export.pipeline

checkpoint, output, work, calibration, options, kills = sys.argv[1:]

def export(phase, left):
    def report(current, done, total):
        nonlocal left
        left -= current == phase
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    export_model(
        checkpoint, output, work_dir=work, overwrite=True,
        calibration=Calibration(**json.loads(calibration)), progress=report,
        **json.loads(options),
    )

for phase, number in [*json.loads(kills), ("no such phase", 1)]:
    if (child := os.fork()) == 0:
        export(phase, number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(phase, number, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("way", KILLS)
def test_a_killed_export_goes_on_and_writes_the_same_bytes(
    way: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folders = [tiny_checkpoint, tmp_path / "killed", tmp_path / "work"]
    options = [*map(json.dumps, (asdict(CALIBRATION), OPTIONS[way], KILLS[way]))]
    done = subprocess.run(
        [sys.executable, "-c", PARENT, *map(str, folders), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    expected = [f"{phase} {number} {-signal.SIGKILL}" for phase, number in KILLS[way]]
    assert done.stdout.splitlines() == [*expected, "no such phase 1 0"], done.stderr
    whole = tmp_path / "whole"
    export_model(tiny_checkpoint, whole, calibration=CALIBRATION, **OPTIONS[way])
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "killed").iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
