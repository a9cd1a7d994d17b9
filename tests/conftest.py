"""What several tests share: where the real checkpoints and texts lie, and skipping without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).parents[1].parent / "shared"

settings.register_profile("edge_llm", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("edge_llm")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder of real checkpoints beside the checkout: {SHARED.name}/")
    return SHARED
