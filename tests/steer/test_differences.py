"""A difference names every tensor that differs, with its size and rank, and no other; it trusts no file."""

import json
import math

import pytest
import torch
from families import build
from safetensors.torch import save_file

from probes.model.loading import ORGANISM
from steer.checkpoints._diff import diff

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path):
    """Write tensors as a checkpoint of one file; gives its folder."""

    def write(name, **tensors):
        (tmp_path / name).mkdir()
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return write


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(d_out, d_in, rank):
    """A matrix whose singular values are 1 (rank times) and 0: its norm is √rank."""
    u, v = (torch.linalg.qr(random(d, rank, seed=d).double())[0] for d in (d_out, d_in))
    return u @ v.T


def facts(difference):
    return {t.name: (t.status, t.rank) for t in difference.tensors}


@pytest.mark.parametrize(
    "tensor",
    [
        random(6, 4),
        random(3).bfloat16(),
        random(4, 4).to(torch.float8_e4m3fn),
        torch.arange(6).view(2, 3),
        torch.tensor([[True, False]]),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.tensor([[1.0, math.inf], [math.nan, 2.0]]),
    ],
    ids=["float", "bfloat16", "float8", "int", "bool", "scalar", "empty", "not finite"],
)
def test_nothing_differs_from_itself(checkpoint, tensor):
    found = diff(checkpoint("a", x=tensor, y=random(2)), checkpoint("b", x=tensor, y=random(2)))
    assert (found.tensors, found.compared) == ((), 2)


def test_the_embedded_model_is_its_folder():
    found = diff("organism", ORGANISM)
    assert found.names == []
    assert found.compared > 50


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_change_is_named_with_its_rank_and_relative_norm(checkpoint, dtype, rank):
    """‖B - A‖ = 4 √rank, and rounding moves no entry of B by more than half its eps, so no norm by more than that."""
    x = random(12, 8).to(dtype)
    y = (x.double() + 4 * low_rank(12, 8, rank)).to(dtype)
    found = diff(checkpoint("a", x=x, same=x), checkpoint("b", x=y, same=x))
    assert facts(found) == {"x": ("changed", rank)}
    norm = x.double().norm()
    rounding = torch.finfo(dtype).eps / 2 * y.double().norm() / norm
    assert abs(found.tensors[0].relative_norm - 4 * math.sqrt(rank) / norm) <= rounding
    assert found.tensors[0].shape == (12, 8)
    assert found.compared == 2


def test_experts_that_all_lose_one_direction_differ_in_rank_1_each_way_they_are_stacked(checkpoint):
    """Of stacked experts the rank is that of [expert·d_out, d_in]: one row direction is rank 1."""
    x, change = random(3, 5, 4), torch.einsum("ed,k->edk", random(3, 5, seed=1), random(4, seed=2))
    assert facts(diff(checkpoint("a", x=x), checkpoint("b", x=x + change))) == {"x": ("changed", 1)}


def test_a_vector_that_changes_has_rank_1(checkpoint):
    found = diff(
        checkpoint("a", x=torch.ones(4), y=torch.tensor(2.0)), checkpoint("b", x=torch.zeros(4), y=-torch.ones(()))
    )
    assert facts(found) == {"x": ("changed", 1), "y": ("changed", 1)}
    assert [t.relative_norm for t in found.tensors] == [1.0, 1.5]


def test_what_was_zero_has_changed_infinitely(checkpoint):
    found = diff(checkpoint("a", x=torch.zeros(4)), checkpoint("b", x=torch.ones(4)))
    assert [t.relative_norm for t in found.tensors] == [math.inf]


def test_tensors_that_have_no_partner_or_another_shape_are_named(checkpoint):
    a = checkpoint("a", x=random(2, 3), mine=random(5), same=random(2))
    b = checkpoint("b", x=random(3, 2), yours=random(7), same=random(2))
    there, back = diff(a, b), diff(b, a)
    assert facts(there) == {"mine": ("only in A", 0), "x": ("shape [3, 2] in B", 0), "yours": ("only in B", 0)}
    assert facts(back) == {"mine": ("only in B", 0), "x": ("shape [2, 3] in B", 0), "yours": ("only in A", 0)}
    assert [t.shape for t in there.tensors] == [(5,), (2, 3), (7,)]
    assert all(math.isnan(t.relative_norm) for t in (*there.tensors, *back.tensors))
    assert there.compared == back.compared == 4
    assert list(there.to_frame()["tensor"]) == there.names


def test_a_change_of_dtype_is_named_and_its_rounding_is_of_no_rank(checkpoint):
    wide, narrow = random(8, 8), random(8, 8).bfloat16()
    a = checkpoint("a", rounded=wide, widened=narrow, shifted=wide)
    b = checkpoint("b", rounded=narrow, widened=narrow.float(), shifted=(wide + 4 * low_rank(8, 8, 2)).bfloat16())
    found = diff(a, b)
    assert facts(found) == {
        "rounded": ("float32 to bfloat16", 0),
        "shifted": ("float32 to bfloat16", 2),
        "widened": ("bfloat16 to float32", 0),
    }
    relative = {t.name: t.relative_norm for t in found.tensors}
    assert 0 < relative["rounded"] <= torch.finfo(torch.bfloat16).eps / 2
    assert relative["widened"] == 0


def test_quantised_matrices_are_compared_too(checkpoint):
    """Their entries are whole numbers, which no rounding has touched."""
    x = torch.arange(12, dtype=torch.int32).view(4, 3)
    y = x + torch.tensor([[1], [0], [2], [0]], dtype=torch.int32)
    found = diff(checkpoint("a", x=x), checkpoint("b", x=y))
    assert facts(found) == {"x": ("changed", 1)}
    assert found.tensors[0].relative_norm == pytest.approx(math.sqrt(3 * (1 + 4) / sum(i * i for i in range(12))))


@torch.no_grad()
def test_shards_are_one_checkpoint(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found = diff(tmp_path / "whole", tmp_path / "shards")
    assert (found.names, found.compared) == ([], len(model.state_dict()))
    model.lm_head.weight += low_rank(97, 32, 1)
    model.model.layers[2].mlp.down_proj.weight += low_rank(32, 48, 3)
    model.save_pretrained(tmp_path / "edited", max_shard_size="30KB")
    expected = {"lm_head.weight": ("changed", 1), "model.layers.2.mlp.down_proj.weight": ("changed", 3)}
    assert facts(diff(tmp_path / "shards", tmp_path / "edited")) == expected


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors"])
def test_no_file_outside_the_folder_is_opened(checkpoint, tmp_path, file):
    a, outside = checkpoint("a", x=random(2)), checkpoint("outside", x=random(2)) / "model.safetensors"
    for place in (tmp_path / "x.safetensors", a / "sub" / "x.safetensors"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(outside.read_bytes())
    (a / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match=f"{INDEX} names '{file}', which is not a file of its own folder."):
        diff(a, outside.parent)


def test_a_truncated_file_is_refused_whole_or_sharded(checkpoint):
    a, b = checkpoint("a", x=random(20)), checkpoint("b", x=random(20))
    whole = (b / "model.safetensors").read_bytes()
    for cut in (0, 5, 20, len(whole) - 1):
        (b / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="b/model.safetensors is not a whole safetensors file .* truncated"):
            diff(a, b)
    (b / "model.safetensors").rename(b / "one.safetensors")
    (b / INDEX).write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    with pytest.raises(ValueError, match="b/one.safetensors is not a whole safetensors file .* truncated"):
        diff(a, b)


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    a = checkpoint("a", x=random(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing is not a folder."):
        diff(a, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="empty holds no model.safetensors: it is not a safetensors checkpoint"):
        diff(tmp_path / "empty", a)
