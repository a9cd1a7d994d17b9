"""From a Hugging Face checkpoint to a verified bundle; imported as edge_llm_export.

from edge_llm_export import export_model

export_model("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-int4", quantize="int4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import export_model
    from .quantize.calibration import Calibration

__all__ = ["Calibration", "export_model"]


def __getattr__(name: str) -> Any:
    # The export stack is imported on first use, so that `edge-llm --help` need not wait for it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline import export_model
    from .quantize.calibration import Calibration

    return Calibration if name == "Calibration" else export_model
