"""A page in a browser without a window."""

import shutil
import subprocess
from pathlib import Path

import pytest
from devtools import BROWSERS

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
    *("--virtual-time-budget=10000", "--dump-dom"),
)


def browsed(page: Path, profile: Path, *more: str) -> tuple[str, str]:
    """The page when it has run, and what was logged."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail("The page is drawn by a browser, and there is none: apt-get install chromium.")
    command = [browser, *QUIET, *more, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
