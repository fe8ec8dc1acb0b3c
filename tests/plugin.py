"""The plugin's folder, importable as vLLM sees it: it is a package of its own, beside ours."""

import sys
from pathlib import Path

PLUGIN = Path(__file__).parents[1] / "steer" / "engines" / "vllm" / "plugin"
if str(PLUGIN) not in sys.path:
    sys.path.insert(0, str(PLUGIN))
