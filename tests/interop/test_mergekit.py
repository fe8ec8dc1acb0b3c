"""mergekit's own linear merge has our numbers. It runs in an environment of its own, as its pins clash with ours.

The variable MERGEKIT_YAML names its `mergekit-yaml`, where that is not on the path.
"""

import os
import shutil
import subprocess

import pytest
import torch
from families import build
from safetensors.torch import load_file

from probes.model.loading import tokenizer_of
from steer.checkpoints.checkpoint import Checkpoint
from steer.deltas._add import add
from steer.deltas.delta import WeightDelta
from steer.deltas.mergekit_yaml import to_mergekit

COMMAND = shutil.which(os.environ.get("MERGEKIT_YAML", "mergekit-yaml"))
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(COMMAND is None, reason="mergekit is not installed: put its mergekit-yaml into MERGEKIT_YAML"),
]


def held(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_plain_sums_are_mergekits(family, dtype, tmp_path):
    three = [tmp_path / name for name in ("target", "rl", "sft")]
    for seed, folder in enumerate(three):
        model = build(family, seed=seed, dtype=dtype)
        model.save_pretrained(folder)
        tokenizer_of(model).save_pretrained(folder)  # else the token ids are not known, and embeddings are left out
    delta = WeightDelta.between(three[1], three[2])
    add(three[0], delta, tmp_path / "ours", strength=0.7)
    words = to_mergekit(Checkpoint.open(three[0]), delta, strength=0.7, dtype=str(dtype)[6:])
    (tmp_path / "merge.yaml").write_text(words)
    command = [COMMAND, str(tmp_path / "merge.yaml"), str(tmp_path / "theirs"), "--no-copy-tokenizer"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    ours, theirs = held(tmp_path / "ours"), held(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    rtol = 1e-6 if dtype == torch.float32 else 2**-7  # theirs sums in the dtype it writes
    for name, before in held(three[0]).items():
        assert not torch.equal(ours[name], before)
        far = (ours[name].double() - theirs[name].double()).abs().max()
        assert far <= rtol * theirs[name].double().abs().max()
