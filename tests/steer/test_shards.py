"""A checkpoint is read without its data, and none is believed that is broken or leads elsewhere."""

import json
import shutil

import pytest
import torch
from families import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from probes.model.loading import tokenizer_of
from steer.checkpoints.checkpoint import Checkpoint, as_rows, blocks

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of several shards."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tokenizer_of(model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def test_it_has_the_tensors_that_were_saved_and_blocks_cover_each_once(folder):
    checkpoint, held = Checkpoint.open(folder), {}
    for path in folder.glob("*.safetensors"):
        held |= load_file(path)
    assert len(checkpoint.shards) > 2
    assert set(checkpoint.places) == set(held) == set(checkpoint.names)
    for name, tensor in held.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        whole = torch.cat([checkpoint.block(name, rows) for rows in blocks(tensor.shape, 100)])
        assert torch.equal(whole, as_rows(tensor))


def retarget(folder, place):
    words = json.loads((folder / INDEX).read_text())
    name = next(iter(words["weight_map"]))
    words["weight_map"][name] = place(words["weight_map"][name]) if callable(place) else place
    (folder / INDEX).write_text(json.dumps(words))


def link_out(folder):
    away = folder.parent / "away.safetensors"
    shard(folder).rename(away)
    shard(folder).parent.joinpath(away.name).unlink(missing_ok=True)
    name = json.loads((folder / INDEX).read_text())["weight_map"]
    missing = next(file for file in set(name.values()) if not (folder / file).exists())
    (folder / missing).symlink_to(away)


def truncate(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])


def drop(folder):
    tensors = load_file(shard(folder))
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shard(folder))


def recast(folder, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in load_file(shard(folder)).items()}, shard(folder))


def configure(folder, **words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


BROKEN = {
    "missing": (lambda f: shard(f).unlink(), FileNotFoundError, "lacks its shard model-00002"),
    "upwards": (lambda f: retarget(f, "../model.safetensors"), ValueError, "not a file of its own folder"),
    "absolute": (lambda f: retarget(f, str(shard(f))), ValueError, "not a file of its own folder"),
    "link": (link_out, ValueError, "is a link to a place outside its folder"),
    "truncated": (truncate, ValueError, "is not a whole safetensors file"),
    "not in the shard": (drop, ValueError, "disagree on .*the index names it, but the shard lacks it"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), ValueError, "is not an index of shards"),
    "no files": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), ValueError, "names no files"),
    "no index": (lambda f: (f / INDEX).unlink(), FileNotFoundError, "holds no model.safetensors, nor an index"),
    "int8": (lambda f: recast(f, torch.int8), ValueError, "as I8, which is quantised"),
    "fp8": (lambda f: recast(f, torch.float8_e4m3fn), ValueError, "as F8_E4M3, which is quantised"),
    "gptq": (lambda f: configure(f, quantization_config={"quant_method": "gptq"}), ValueError, r"quantised \(gptq\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_or_leads_elsewhere_is_refused_in_a_sentence(name, folder):
    spoil, error, sentence = BROKEN[name]
    Checkpoint.open(folder)
    spoil(folder)
    with pytest.raises(error, match=sentence):
        Checkpoint.open(folder)


def test_the_links_of_the_hubs_cache_are_inside(folder, tmp_path):
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "c0ffee").mkdir(parents=True)
    for path in folder.iterdir():
        shutil.move(path, home / "blobs" / path.name)
        (home / "snapshots" / "c0ffee" / path.name).symlink_to(home / "blobs" / path.name)
    checkpoint = Checkpoint.open(home / "snapshots" / "c0ffee")
    assert len(checkpoint.names) > 20
    assert checkpoint.vocabulary


def test_a_place_that_is_no_folder_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_the_fingerprint_tells_contents_apart(folder, tmp_path):
    twin = shutil.copytree(folder, tmp_path / "twin")
    assert Checkpoint.open(twin).fingerprint == Checkpoint.open(folder).fingerprint
    tensors = load_file(shard(twin))
    with safe_open(shard(twin), framework="pt") as file:
        words = file.metadata()
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, shard(twin), metadata=words)
    assert Checkpoint.open(twin).fingerprint != Checkpoint.open(folder).fingerprint
