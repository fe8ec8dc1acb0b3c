"""Run the notebooks and keep what they print and draw, as text and PNG: `make notebooks`, or the names of some.

A notebook is written whole or not at all, with a checksum of its code, by which the tests see that its outputs are of
the code that it shows. What goes to the error stream, such as bars, is left out.
"""

import hashlib
import os
import sys
import time
from base64 import b64decode
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from probes.files import staged_file

FOLDER = Path(__file__).parent
GALLERY = FOLDER.parent / "docs" / "gallery"  # the first picture of each
LARGEST = 1_000_000


def main() -> None:
    os.environ["PLOTLY_RENDERER"] = "png"
    wanted = sys.argv[1:]
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not wanted or path.stem in wanted:
            began = time.perf_counter()
            size = execute(path)
            print(f"{path.name}: {size / 1e3:.0f} kB in {time.perf_counter() - began:.0f} s", flush=True)


def execute(path: Path) -> int:
    """Bytes of what was written. Raises ValueError where they are too many."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["thinksteer"] = {"code": checksum(notebook)}
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{path.name} would take {len(text):,} bytes, and {LARGEST:,} are the most that are kept.")
    with staged_file(path) as stage:
        stage.write_text(text, encoding="utf-8")
    pictures = pictures_in(notebook)
    if pictures:
        with staged_file(GALLERY / f"{path.stem}.png") as stage:
            stage.write_bytes(pictures[0])
    return len(text)


def pictures_in(notebook: nbformat.NotebookNode) -> list[bytes]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [b64decode(picture) for picture in found]


def checksum(notebook: nbformat.NotebookNode) -> str:
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
