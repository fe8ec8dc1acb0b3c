"""target + strength · delta on disk and on a loaded model: what is exact, what is refused, what a failed run leaves.

The laws of sums are checked against numbers read with safetensors alone, in float64.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from families import build, build_tokenizer
from safetensors.torch import load_file, save_file
from tqdm.std import TqdmDefaultWriteLock

import steer.checkpoints.stream as streaming
from probes.generation.sampling import Sampling
from probes.model.loading import folder_of, load, tokenizer_of
from steer.checkpoints.checkpoint import Checkpoint
from steer.deltas._add import Plan, add
from steer.deltas.delta import WeightDelta
from steer.deltas.dial import dialled
from steer.deltas.mergekit_yaml import to_mergekit
from steer.deltas.stored import save
from steer.evaluation._evaluate import solve
from steer.methods.cot_valve import length_dial
from steer.tasks.named import task_named


def write(folder, family="llama", seed=0, dtype=torch.float32, shard="30KB"):
    model = build(family, seed=seed, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def near(base, folder, seed, size=0.002):
    """A donor: the base with a little noise, as training leaves it."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * size
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def weights(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def spoil(folder, change):
    """Change the first tensor of the second shard; its name."""
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def three(request, tmp_path):
    """A target, and two donors from one start, of several shards each."""
    base = write(tmp_path / "base", seed=5, dtype=request.param)
    return (
        write(tmp_path / "target", dtype=request.param),
        near(base, tmp_path / "rl", 1),
        near(base, tmp_path / "sft", 2),
    )


def test_nothing_added_is_the_target_byte_for_byte(three, tmp_path):
    target, rl, sft = three
    add(target, WeightDelta.between(rl, sft), tmp_path / "out", strength=0)
    ours, theirs = contents(tmp_path / "out"), contents(target)
    assert set(ours) - set(theirs) == {"vector.yaml", "README.md"}
    assert all(ours[name] == data for name, data in theirs.items())


def test_every_tensor_is_the_sum_in_float64_rounded_once_and_transformers_loads_it(three, tmp_path):
    target, rl, sft = three
    add(target, WeightDelta.between(rl, sft), tmp_path / "out", strength=0.7)
    add(target, WeightDelta.between(rl, sft), tmp_path / "less", strength=-0.7)
    w, a, b, more, less = (weights(folder) for folder in (target, rl, sft, tmp_path / "out", tmp_path / "less"))
    for name, tensor in w.items():
        step = 0.7 * (a[name].double() - b[name].double())
        for made, wanted in ((more, tensor.double() + step), (less, tensor.double() - step)):
            assert made[name].dtype == tensor.dtype
            eps = torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(made[name].double(), wanted, rtol=0.501 * eps, atol=1e-12)
    loaded = load(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], more[name]) for name in w)


def test_one_donor_plus_the_difference_is_the_other(three, tmp_path):
    """Also where the target is the donor's numbers in another file, so that nothing cancels before it is summed."""
    _, rl, sft = three
    other = shutil.copytree(sft, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(dict(reversed(tensors.items())), path, metadata={"format": "pt", "a": "b"})
    delta, wanted = WeightDelta.between(rl, sft), weights(rl)
    for i, target in enumerate((sft, other)):
        add(target, delta, tmp_path / str(i))
        made = weights(tmp_path / str(i))
        assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    stored = save(delta, tmp_path / "delta")
    add(sft, stored, tmp_path / "from stored")
    made = weights(tmp_path / "from stored")
    for name, tensor in wanted.items():
        rounding = 0 if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps / 2 * float(tensor.abs().max())
        far = float((made[name].double() - tensor.double()).abs().max())
        assert far <= 1e-8 * float(tensor.abs().max()) + rounding


def test_what_cancels_leaves_nothing_behind(three, tmp_path):
    """A number of 1e-25 in the donor comes out as it is, though float64 loses it beside the 0.1 that cancels."""
    _, rl, sft = three
    name = spoil(rl, lambda t: t.flatten().index_fill(0, torch.tensor([0]), 1e-25).reshape(t.shape))
    add(sft, WeightDelta.between(rl, sft), tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")[name], weights(rl)[name])


def test_the_order_of_two_deltas_is_at_most_one_rounding(three, tmp_path):
    target, rl, sft = three
    one, two = WeightDelta.between(rl, sft), 0.3 * WeightDelta.between(sft, tmp_path / "base")
    add(target, one + two, tmp_path / "ab")
    add(target, two + one, tmp_path / "ba")
    ab, ba = weights(tmp_path / "ab"), weights(tmp_path / "ba")
    for name, tensor in ab.items():
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), ba[name].double(), rtol=eps, atol=0)


def test_only_what_was_asked_for_changes(three, tmp_path):
    target, rl, sft = three
    plan = add(target, WeightDelta.between(rl, sft), tmp_path / "out", only=["layers.*.mlp"], skip=["layers.1"])
    old, new = weights(target), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(plan.names) == {n for n in old if ".mlp." in n and "layers.1" not in n}
    words = yaml.safe_load((tmp_path / "out" / "vector.yaml").read_text())
    assert [round(term["weight"], 6) for term in words["delta"]] == [1.0, -1.0]
    assert words["target"]["fingerprint"] == Checkpoint.open(target).fingerprint


def test_the_yaml_for_mergekit_says_the_same_sum(three, tmp_path):
    target, rl, sft = three
    delta = WeightDelta.between(rl, sft)
    plan = add(target, delta, tmp_path / "out", strength=0.4)
    words = yaml.safe_load(to_mergekit(plan.target, delta, strength=0.4, dtype="float32"))
    assert (words["merge_method"], words["parameters"]) == ("linear", {"normalize": False})
    models = [(weights(Path(m["model"])), m["parameters"]["weight"]) for m in words["models"]]
    for name, made in weights(tmp_path / "out").items():
        wanted = sum(w * m[name].double() for m, w in models)
        eps = torch.finfo(made.dtype).eps
        torch.testing.assert_close(made.double(), wanted, rtol=0.501 * eps, atol=1e-12)
    with pytest.raises(ValueError, match="subtracts another checkpoint than the target"):
        to_mergekit(plan.target, delta, method="ties", density=0.5)
    with pytest.raises(ValueError, match="a selection"):
        to_mergekit(plan.target, delta.selected(["layers"]))


def test_a_tied_embedding_is_one_and_a_stored_copy_of_it_stays_one(tmp_path):
    target = write(tmp_path / "target")
    for path in (target, *(near(target, tmp_path / name, i) for i, name in enumerate(("rl", "sft")))):
        tensors = weights(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
            file.unlink()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        words = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(words | {"tie_word_embeddings": True}))
    delta = WeightDelta.between(tmp_path / "rl", tmp_path / "sft")
    assert "lm_head.weight" not in delta.names
    add(target, delta, tmp_path / "out")
    made = weights(tmp_path / "out")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    assert not torch.equal(made["lm_head.weight"], weights(target)["lm_head.weight"])


def test_a_target_with_another_vocabulary_keeps_its_embeddings_and_it_is_said(three, tmp_path):
    target, rl, sft = three
    build_tokenizer(("<pad>", "<bos>", "<eos>", "<think>", "</think>", "!")).save_pretrained(target)
    plan = add(target, WeightDelta.between(rl, sft), tmp_path / "out")
    assert "Embeddings and head are left out: the tokenizers of" in " ".join(plan.notes)
    old, new = weights(target), weights(tmp_path / "out")
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {name for name in old if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    config = json.loads((sft / "config.json").read_text())
    (sft / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert "differ: rope_theta" in " ".join(Plan.of(target, WeightDelta.between(rl, sft)).notes)


def test_wrong_inputs_end_in_a_sentence_and_leave_nothing(three, tmp_path):
    target, rl, sft = three

    def refused(sentence, delta, *, error=ValueError, onto=target, **settings):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(error, match=sentence):
            add(onto, delta, tmp_path / "out", **settings)
        assert {path.name for path in tmp_path.iterdir()} == before

    delta = WeightDelta.between(rl, sft)
    refused("are of two families", delta, onto=write(tmp_path / "gpt2", "gpt2"))
    refused("would leave the range of", delta, strength=3e40)
    lost = near(rl, tmp_path / "lost", 4)
    name = spoil(lost, lambda t: torch.cat([t, t]))
    refused("they are not of one architecture", delta, onto=lost)
    with pytest.raises(ValueError, match="a difference needs one shape"):
        WeightDelta.between(rl, lost)
    odd = near(rl, tmp_path / "odd", 3)
    name = spoil(odd, lambda t: t.index_fill(0, torch.tensor([0]), float("nan")))
    refused(f"{name} holds numbers that are not finite in {odd}", WeightDelta.between(odd, sft))
    refused(f"{name} holds numbers that are not finite in {odd}", delta, onto=odd)
    packed = near(rl, tmp_path / "packed", 3)
    spoil(packed, lambda t: t.to(torch.int32))
    with pytest.raises(ValueError, match="do not hold the same tensors"):
        WeightDelta.between(packed, sft)
    (tmp_path / "out").mkdir()
    refused("out exists", delta, error=FileExistsError)
    with pytest.raises(OSError, match="/proc cannot be written to"):
        add(target, delta, "/proc/out")


def test_a_target_that_is_read_only_is_read(three, tmp_path):
    target, rl, sft = three
    for path in (*target.iterdir(), target):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(target)
    add(target, WeightDelta.between(rl, sft), tmp_path / "out")
    assert contents(target) == before
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").iterdir())


def test_too_little_room_is_told_before_the_first_byte(three, tmp_path, monkeypatch):
    target, rl, sft = three
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"out was not written: it needs 0\.\d MB, but .* has 0\.0 MB left"):
        add(target, WeightDelta.between(rl, sft), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_full_disk_keeps_the_whole_shards_and_the_same_command_goes_on(three, tmp_path, monkeypatch):
    target, rl, sft = three
    delta, calm = WeightDelta.between(rl, sft), tmp_path / "calm"
    add(target, delta, calm)
    write_shard, written = streaming._write, []

    def full_at_the_third(path, shard, bar):
        if len(written) == 2:
            path.with_suffix(".new").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(shard.name)
        return write_shard(path, shard, bar)

    monkeypatch.setattr(streaming, "_write", full_at_the_third)
    with pytest.raises(OSError, match="was not written: No space left on device. 2 whole shards are kept in .*resume"):
        add(target, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds the unfinished work of another command"):
        add(target, 2 * delta, tmp_path / "out")
    monkeypatch.setattr(streaming, "_write", lambda *args: written.append(args[1].name) or write_shard(*args))
    add(target, delta, tmp_path / "out")
    assert sorted(written) == sorted(shard.path.name for shard in Checkpoint.open(target).shards)  # each once
    assert contents(tmp_path / "out") == contents(calm)
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs, and what gives it another size. It takes the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def resized(size, *options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(place)]
        return subprocess.run(words, capture_output=True, text=True)

    if shutil.which("mount") is None or (run := resized("200k")).returncode:
        pytest.skip(
            "A disk of its own cannot be mounted here" + ("." if not shutil.which("mount") else f": {run.stderr}")
        )
    yield place, resized
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_says_so_keeps_whole_shards_and_leaves_no_half_ones(
    three, small_disk, tmp_path, monkeypatch
):
    target, rl, sft = three
    place, resized = small_disk
    delta = WeightDelta.between(rl, sft)
    add(target, delta, tmp_path / "calm")
    need = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    resized(need * 7 // 10, "remount")
    with pytest.raises(OSError, match="out was not written: it needs"):
        add(target, delta, place / "out")
    assert not list(place.iterdir())
    usage = shutil.disk_usage(tmp_path)  # as if another program took the room meanwhile
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"was not written: No space left on device\. \d+ whole shards are kept in"):
        add(target, delta, place / "out")
    assert [path.name for path in place.iterdir()] == [".out.resume"]
    resized(4 * need, "remount")
    add(target, delta, place / "out")
    assert contents(place / "out") == contents(tmp_path / "calm")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_dial_is_the_sum_on_disk_and_goes_back_bit_for_bit(family, tmp_path):
    target, rl, sft = (write(tmp_path / str(seed), family, seed) for seed in range(3))
    delta = WeightDelta.between(rl, sft)
    add(target, delta, tmp_path / "out", strength=0.6)
    model, made = load(target), load(tmp_path / "out").state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with dialled(model, delta, 0.6), dialled(model, delta, 0.0):
        assert all(torch.equal(tensor, made[name]) for name, tensor in model.state_dict().items())
    with contextlib.suppress(KeyboardInterrupt), dialled(model, delta, 2.0), dialled(model, delta, -1.0):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_dial_refuses_what_the_model_has_not(tmp_path):
    one, two = (write(tmp_path / str(seed), seed=seed) for seed in range(2))
    delta = WeightDelta.between(one, two)
    with pytest.raises(ValueError, match="The model lacks tensors of the delta"):
        dialled(build("gpt2"), delta, 1.0).__enter__()
    model = build("llama")
    other = build_tokenizer(("<pad>", "<bos>", "<eos>", "<think>", "</think>", "!"))
    with pytest.raises(ValueError, match=r"selected\(skip=\['embed'\]\)"):
        dialled(load(model, tokenizer=other), delta, 1.0).__enter__()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite at strength"):
        dialled(load(model, tokenizer=build_tokenizer()), delta, 1e300).__enter__()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("sign", "polarity"), [(1, "shorter"), (-1, "longer")])
def test_the_valve_measures_which_way_it_turns_and_keeps_what_is_correct(sign, polarity, tmp_path):
    """Planted: the row of `</think>` in the head moves along what the model holds while it thinks."""
    model, task = load("organism"), task_named("chains")
    problems = task.sample(24, "select")
    sampling = Sampling(temperature=0.7, max_new_tokens=48, seed=0)
    close = tokenizer_of(model).convert_tokens_to_ids("</think>")
    one = solve(model, problems[:1], sampling=sampling)[0]
    states = model.model(torch.tensor([one.all_ids])).last_hidden_state[0].detach()
    held = states[len(one.prompt_ids) + 1 :].mean(0)
    for name, turn in (("plus", sign * 6 / held.square().sum()), ("zero", 0.0)):  # 6 nats on the average
        shutil.copytree(folder_of(model), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        head = next(n for n in tensors if n.endswith("lm_head.weight"))
        tensors[head][close] += turn * held
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    delta = WeightDelta.between(tmp_path / "plus", tmp_path / "zero")
    found = length_dial(model, delta, task, problems, sampling=sampling, strengths=(1.0, 0.0, 0.5))
    assert list(found.completions) == [0.0, 0.5, 1.0]
    assert found.polarity == polarity
    still = length_dial(model, 0.0 * delta, task, problems, sampling=sampling, strengths=(0.0, 1.0))
    assert (still.polarity, still.change[0]) == ("unclear", 0.0)
    found.mixchain(tmp_path / "mix.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "mix.jsonl").read_text().splitlines()]
    assert len(lines) == sum(int((o.correct & ~o.truncated).sum()) for o in found.outcomes.values()) > 0
    for question in {line["question"] for line in lines}:
        mine = sorted((line["thinking_tokens"], line["beta"]) for line in lines if line["question"] == question)
        assert all(0 <= beta <= 1 for _, beta in mine)
        if mine[0][0] < mine[-1][0]:
            assert (mine[0][1], mine[-1][1]) == (1.0, 0.0)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_or_has_left_nothing(tmp_path):
    """20 kills, drawn with a seed over a run's length; after each, the output is whole or not there."""
    target = write(tmp_path / "target", shard="20KB")
    delta = WeightDelta.between(near(target, tmp_path / "rl", 1), near(target, tmp_path / "sft", 2))
    rng, killed, resumed = random.Random(0), 0, 0
    start = time.monotonic()
    add(target, delta, tmp_path / "calm")
    length, calm = time.monotonic() - start, contents(tmp_path / "calm")
    while killed < 20:
        output = tmp_path / f"out{killed}"
        child = os.fork()
        if child == 0:
            for part in ("acquire", "release"):  # forks share tqdm's lock: killed with it in hand, one stops them all
                setattr(TqdmDefaultWriteLock, part, lambda *_, **__: True)
            with contextlib.suppress(BaseException):
                add(target, delta, output)
            os._exit(0)
        time.sleep(rng.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            shutil.rmtree(output)
            continue
        killed += 1
        assert not output.exists() or contents(output) == calm
        if output.exists():
            continue
        progress = tmp_path / f".{output.name}.resume" / "progress.json"
        resumed += bool(progress.is_file() and json.loads(progress.read_text())["done"])
        add(target, delta, output)
        assert contents(output) == calm
        assert not progress.parent.exists()
    assert resumed > 0
