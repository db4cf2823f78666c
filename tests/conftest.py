"""Fixtures that every kind of test uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# How long an example takes says more about the machine than about the code.
settings.register_profile("anywhere", deadline=None)
settings.load_profile("anywhere")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of released files and public data beside the checkout; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (the released tokenizer, configs and public data), which is not there")
    return SHARED
