"""Fixtures that every test folder shares."""

import os
import signal
from pathlib import Path

import pytest

from tests.support import s3_server

__all__ = ["s3_server"]  # a fixture, for every test

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # started in the background of a script; children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real CT: FTENGINE_TEST_DATA, else ../shared/data beside the repository; without it the test is skipped (under CI it fails)."""
    named = os.environ.get("FTENGINE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        reason = f"no real CT at {folder}; set FTENGINE_TEST_DATA to the folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
