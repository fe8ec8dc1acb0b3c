"""A page in a browser without a window."""

import shutil
import subprocess
from itertools import combinations
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


# Of each plot of a page: its own box, and those of all its words, (words, left, top, right, bottom).
BOXES = """(() => {
  const boxes = {};
  [...document.querySelectorAll('.plot')].forEach((plot, i) => {
    const found = [];
    for (const words of plot.querySelectorAll('text')) {
      const box = words.getBoundingClientRect();
      if (words.textContent.trim() && box.width && getComputedStyle(words).opacity !== '0')
        found.push([words.textContent, box.left, box.top, box.right, box.bottom]);
    }
    const whole = plot.getBoundingClientRect();
    boxes[plot.id || i] = {found, whole: [whole.left, whole.top, whole.right, whole.bottom]};
  });
  return boxes;
})()"""


def overlaps(boxes: list[list]) -> list[tuple[str, str]]:
    """Pairs of words that cover each other by more than a pixel each way."""
    return [
        (one[0], other[0])
        for one, other in combinations(boxes, 2)
        if min(one[3], other[3]) - max(one[1], other[1]) > 1 and min(one[4], other[4]) - max(one[2], other[2]) > 1
    ]
