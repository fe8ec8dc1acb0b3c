"""A planted difference is named with its size and its rank; what is equal is not named; what is broken is refused."""

import json

import pytest
import torch
from families import build
from safetensors.torch import save_file

from probes.models import ORGANISM
from steer.differences import diff, tensor_files


def checkpoint(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def plain():
    return {"a": torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), "b": torch.ones(5), "c": torch.eye(4)}


def test_equal_checkpoints_differ_in_nothing():
    same = diff("organism", ORGANISM)
    assert (same.tensors, same.compared) == ((), len(tensor_files("organism")))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_change_is_named_with_its_rank_and_its_norm(tmp_path, plain, rank, dtype):
    left, right = torch.randn(24, rank), torch.randn(rank, 16)
    stored = {name: tensor.to(dtype) for name, tensor in plain.items()}
    changed = (stored["a"].float() + left @ right).to(dtype)
    a, b = checkpoint(tmp_path / "a", stored), checkpoint(tmp_path / "b", {**stored, "a": changed})
    (found,) = diff(a, b).tensors
    size = (changed.double() - stored["a"].double()).norm() / stored["a"].double().norm()
    assert (found.name, found.status, found.rank) == ("a", "changed", rank)
    assert found.relative_norm == pytest.approx(float(size))


def test_what_is_in_one_only_or_of_another_shape_or_dtype_is_named(tmp_path, plain):
    a = checkpoint(tmp_path / "a", plain)
    b = checkpoint(tmp_path / "b", {"a": plain["a"].half(), "b": torch.ones(6), "d": torch.ones(1)})
    assert {t.name: t.status for t in diff(a, b).tensors} == {
        "a": "float32 to float16",
        "b": "shape [6] in B",
        "c": "only in A",
        "d": "only in B",
    }


def test_shards_are_one_checkpoint(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10kB")
    assert len(set(tensor_files(tmp_path / "many").values())) > 1
    assert diff(tmp_path / "one", tmp_path / "many").tensors == ()


def test_no_file_outside_the_folder_is_opened(tmp_path, plain):
    checkpoint(tmp_path / "secret", plain)
    (tmp_path / "bad").mkdir()
    index = {"weight_map": {"a": "../secret/model.safetensors"}}
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names '../secret/model.safetensors', which is not a file of its own folder"):
        diff(tmp_path / "bad", tmp_path / "secret")


def test_what_is_not_whole_or_not_there_is_refused(tmp_path, plain):
    a, b = checkpoint(tmp_path / "a", plain), checkpoint(tmp_path / "b", plain)
    (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a whole safetensors file .* It may be truncated"):
        diff(a, b)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        diff(a, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors: it is not a safetensors checkpoint"):
        diff(a, tmp_path)
