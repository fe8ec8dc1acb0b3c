"""One small valid file of each kind that is read, and how it is read: what the fuzzer damages."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from exchanges import NAMES, control_vector, recipe_for
from families import build
from transformers import PreTrainedModel

from probes import Direction, Sampling, direction_between, generate, load, read_completions, write_completions
from probes.generation.store import Store, _holder
from probes.gguf_files import check_gguf
from probes.model import Site, tokenizer_of
from probes.saes import SparseAutoencoder, load_sae, save_sae
from probes.tensors import read_tensors, write_tensors
from probes.texts import read_json, read_json_lines, read_yaml
from probes.thinking import text_spans
from steer import (
    Ablate,
    Add,
    Attend,
    Clamp,
    Condition,
    Controller,
    Recipe,
    Rotate,
    Scale,
    Schedule,
    Scope,
    SetLatents,
    Step,
    diff,
)
from steer.checkpoints import Checkpoint
from steer.checkpoints.stream import stream
from steer.deltas import Adapter, Stored, WeightDelta, open_delta, save
from steer.folding import export_adapter
from steer.interop import export_recipe, import_recipe
from steer.interventions import Forbid, Force, Reinforce
from steer.report import write_report
from steer.tasks import task_named

PROMPTS = ["a 3 b +4 c *7", "a 5 b -2 c +9 quick"]


@dataclass(frozen=True)
class Target:
    """`build` writes a file, and what belongs beside it, into a folder; `read` reads the file and looks at it.

    `kind` is that of `mutations.KINDS`; `share` is how often it is damaged, beside the others.
    """

    name: str
    build: Callable[[Path], Path]
    read: Callable[[Path], object]
    kind: str = "bytes"
    share: float = 1.0


@lru_cache
def organism() -> PreTrainedModel:
    return load("organism")


@lru_cache
def tiny() -> PreTrainedModel:
    return build("qwen3_moe")


@lru_cache
def direction() -> Direction:
    quick, plain = [text + " quick" for text in PROMPTS[:1]], PROMPTS[:1]
    return 2 * direction_between(organism(), quick, plain, "L2.resid_post", position="text_last")


def recipe() -> Recipe:
    """All that a recipe file may hold."""
    at, along = direction().site, direction().vector
    thinking = Scope(
        "thinking", tokens=(5, 9), after=1, markers=((7,), (8, 9)), window=(0, 40),
        schedule=Schedule("cosine", 1.0, 0.0, 20), condition=Condition.of(direction(), 0.5),
    )  # fmt: skip
    controlled = Scope("thinking", controller=Controller(20.0, site=at, vector=along))
    steps = [
        Step(Add(at, along, 0.5, direction().provenance), thinking), Step(Ablate(at, along), controlled),
        Step(SetLatents.of(load_sae("organism-L1"), {3: 1.0, 5: 0.0}), thinking),
        Step(Scale(at, 0.5), Scope("answer")), Step(Clamp(at, along, high=1.0)), Step(Rotate(at, along, 1.0)),
        *map(Step, (Reinforce.of((2, 5), 8.0), Force.of((2, 3)), Forbid.of((1, 4)))),
        Step(Attend(Site(2, "pattern", 3), 2.0, first=1, last=4), Scope("answer")),
    ]  # fmt: skip
    return Recipe(tuple(steps), Recipe.of(organism(), []).model, "by hand")


def _autoencoder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=40, k=4, activation="jumprelu")
        save_sae(sae, folder / "sae")
        return folder / "sae" / name

    return make


def _autoencoder_of_sparsify(folder: Path) -> Path:
    place, sae = folder / "layers.3", SparseAutoencoder.at_random("L3.resid_post", d_in=96, d_sae=40, k=4)
    place.mkdir()
    (place / "cfg.json").write_text(json.dumps({"num_latents": 40, "k": 4, "d_in": 96, "activation": "topk"}))
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    write_tensors(place / "sae.safetensors", tensors)
    return place / "cfg.json"


def _autoencoder_pickled(folder: Path) -> Path:
    sae = SparseAutoencoder.at_random("L3.resid_post", d_in=96, d_sae=40, k=4)
    named = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    torch.save(named, folder / "layer3.sae.pt")
    return folder / "layer3.sae.pt"


def _read_autoencoder(file: Path) -> object:
    read = load_sae(file if file.suffix == ".pt" else file.parent, pickle=True, k=4)
    return repr(read), str(read), read(torch.ones(2, 96))


def _recipe(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        recipe().write(folder)
        return folder / name

    return make


def _recipe_1(folder: Path) -> Path:
    Recipe.of(organism(), [Add(Site(2, "resid_post"), torch.ones(96), 0.5)]).write(folder)
    words = yaml.safe_load((folder / "recipe.yaml").read_text())
    words.pop("births")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(words | {"format": "thinksteer recipe 1"}))
    return folder / "recipe.yaml"


def _read_recipe(file: Path) -> object:
    read = Recipe.load(file.parent)
    return str(read), str(read.births_table()), read.fingerprint(), repr(read)


def _direction(folder: Path) -> Path:
    direction().save(folder / "d.safetensors")
    return folder / "d.safetensors"


def _direction_0_1(folder: Path) -> Path:
    path = _direction(folder)
    tensors, words = read_tensors(path)
    for key in ("position", "seed", "parents"):
        words["provenance"].pop(key)
    write_tensors(path, tensors, words)
    return path


def _read_direction(file: Path) -> object:
    read = Direction.load(file)
    return str(read), repr(read), read.to_frame(), read.provenance.line()


def _completions(folder: Path) -> Path:
    write_completions(folder / "c.jsonl", generate(organism(), PROMPTS, samples=2))
    return folder / "c.jsonl"


def _read_completions(file: Path) -> object:
    return [(c.thinking_tokens, c.truncated, c.all_ids, c.to_line(), repr(c), c._repr_html_()) for c in
            read_completions(file)]  # fmt: skip


def _append(file: Path) -> None:
    write_completions(file, [])


@contextmanager
def _opened(file: Path) -> Iterator[Store]:
    prompts = {str(i): generate(organism(), PROMPTS)[i].prompt_ids for i in range(2)}
    with Store.opened(file, organism(), prompts, Sampling(max_new_tokens=40), "", "transformers") as store:
        yield store


def _store(folder: Path) -> Path:
    generate(organism(), PROMPTS, sampling=Sampling(max_new_tokens=40), store=folder / "s.jsonl")
    return folder / "s.jsonl"


def _read_store(file: Path) -> object:
    with _opened(file) as store:
        store.order(list(store.rows)[::-1])
        return store.rows


def _held(folder: Path) -> Path:
    (folder / "holder.json").write_text(json.dumps({"pid": 1, "host": "here", "since": "2026-01-01 00:00:00"}))
    return folder / "holder.json"


def _read_holder(file: Path) -> object:
    return _holder(file)


def _texts(folder: Path) -> Path:
    line = generate(organism(), PROMPTS[:1])[0].to_line()
    (folder / "t.jsonl").write_text('{"text": "a 3 b +4"}\n{"text": "a 5"}\n' + line + "\n")
    return folder / "t.jsonl"


def _tasks(folder: Path) -> Path:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(8)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "task.jsonl"


def _delta(name: str, *, linked: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if linked:
            organism().save_pretrained(folder / "after")
            delta = WeightDelta.between(folder / "after", "organism") + open_delta("organism-rl")
            save(delta, folder / "delta", linked=True)
        else:
            save(open_delta("organism-rl").selected(only=["layers.2.self_attn", "norm"]), folder / "delta", rank=2)
        return folder / "delta" / name

    return make


def _read_delta(file: Path) -> object:
    delta = open_delta(file.parent)
    stored = [term.source.kept_energy() for term in delta.terms if isinstance(term.source, Stored)]
    return delta.made_of, [delta.shape(name) for name in delta.names], repr(delta), stored, delta.vocabulary, delta.tied


def _read_tensors_of_delta(file: Path) -> object:
    delta = open_delta(file.parent)
    return [delta.tensor(name).sum() for name in delta.names[:4]]


def _sum(folder: Path) -> Path:
    for name in ("base", "tuned"):
        organism().save_pretrained(folder / name)
        tokenizer_of(organism()).save_pretrained(folder / name)
    save(WeightDelta.between(folder / "tuned", folder / "base"), folder / "delta", linked=True)
    return folder / "delta" / "delta.yaml"


def _adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        export_adapter(organism(), Recipe.of(organism(), [Ablate(Site(2, "result", 3), torch.ones(96))]), folder / "a")
        config = json.loads((folder / "a" / "adapter_config.json").read_text())
        config["alpha_pattern"] = {"self_attn.o_proj|q_proj": 3, "^model.layers.1.mlp": 2.0}
        (folder / "a" / "adapter_config.json").write_text(json.dumps(config))
        return folder / "a" / name

    return make


def _read_adapter(file: Path) -> object:
    adapter = Adapter.open(file.parent)
    return [(adapter.shape(name), adapter.block(name, slice(0, 2))) for name in adapter.names], adapter.notes


def _checkpoint(name: str, *, size: str = "50GB") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tiny().save_pretrained(folder / "m", max_shard_size=size)
        tokenizer_of(tiny()).save_pretrained(folder / "m")
        return folder / "m" / (name or "model.safetensors")

    return make


def _read_checkpoint(file: Path) -> object:
    found = Checkpoint.open(file.parent)
    return found.names, found.tied, found.fingerprint, found.words, [found.read(n).sum() for n in found.names[:3]]


def _read_vocabulary(file: Path) -> object:
    return Checkpoint.open(file.parent).vocabulary


def _read_diff(file: Path) -> object:
    return str(diff(file.parent, file.parent))


def _read_model(file: Path) -> object:
    model = load(file.parent)
    return tokenizer_of(model).encode("w6 w7")


def _progress(folder: Path) -> Path:
    (folder / "progress.json").write_text(json.dumps({"job": {"a": 1}, "done": {"x.safetensors": ["a", "b"]}}))
    return folder / "progress.json"


def _read_progress(file: Path) -> None:
    home = file.parent / "run"
    shutil.rmtree(home, ignore_errors=True)
    (home / ".out.resume").mkdir(parents=True)
    shutil.copy(file, home / ".out.resume" / "progress.json")
    stream(home / "out", [], {"a": 1}, str)


def _gguf(folder: Path) -> Path:
    more = [("uint32", "controlvector.layer_count", 2), ("array", "general.tags", ["a", "b"])]
    rows = {f"direction.{i}": np.linspace(0, 1, 32, dtype=np.float32) for i in (1, 2)}
    control_vector(folder / "v.gguf", rows, more=more)
    return folder / "v.gguf"


def gguf_head(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_uint32("llama.block_count", 2)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def _neighbour(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        export_recipe(recipe_for(tiny(), name), folder / NAMES[name], name)
        return folder / NAMES[name]

    return make


def _easysteer_source(folder: Path) -> Path:
    _gguf(folder)
    vector = {"source": "v.gguf", "algorithm": "direct", "scale": 1.0, "apply": {"prompt": "all", "generation": "all"}}
    (folder / "v.json").write_text(json.dumps({"vectors": [vector], "conflict": "sequential", "debug": False}))
    return folder / "v.json"


def _read_source(file: Path) -> object:
    return import_recipe(file.parent / "v.json", tiny())


def _neighbour_read(file: Path) -> object:
    return str(import_recipe(file, tiny()))


def _named(name: str) -> Callable[[Path], object]:
    return lambda file: str(import_recipe(file, tiny(), name))


def _run_json(folder: Path) -> Path:
    (folder / "run.json").write_text(json.dumps(record()))
    return folder / "run.json"


def record() -> dict[str, object]:
    """A record of a run, of two layers, two heads and two arms."""
    pair = [0.1, 0.2]
    score = {
        "n": 2, "samples": 1, "accuracy": 0.5, "interval": pair, "difference": 0.1, "difference_interval": pair,
        "p": 0.5, "p_adjusted": None, "length": 5.0, "per_1000": 1.0, "truncation": 0.0, "repeated": None,
        "shortest": {"0.1": pair},
    }  # fmt: skip
    dose = {
        "strength": 0.1, "length": 5.0, "length_interval": pair, "accuracy": 0.5, "accuracy_interval": pair,
        "truncation": 0.0,
    }  # fmt: skip
    layer = {"layer": 0, "auroc": 0.9, "null": pair, "random": pair, "cosine": pair, "confounds": {"n": 0.1}, "p": 0.5}
    side = {
        "correct": True, "thinking_tokens": 2, "truncated": False, "left_out": 0, "prompt_tokens": 1, "read": [1, 3],
        "tokens": ["a", "b", "c", "d"], "projections": [0.1, 0.2, None, 0.4],
    }  # fmt: skip
    example = {"kind": "k", "problem": "p", "answer": "1", "subgroup": None, "plain": side, "edited": side}
    arms = {"plain": {**score, "quick": score}, "edited": score | {"quick": score}}
    return {
        "format": "thinksteer run 1",
        "edit": {
            "method": "m", "setting": "s", "site": "L1.resid_post", "position": "thinking", "heads": ["L0H1"],
            "auroc": 0.9, "norm_over_stream_norm": 0.1, "fold_error": 1e-6,
        },
        "evidence": {
            "site": "resid_post", "position": "thinking", "n_long": 2, "n_short": 2,
            "layers": [layer, layer | {"layer": 1}],
        },
        "heads": {"position": "thinking", "raw": [pair, pair], "centred": [pair, pair], "edited": [[0, 1]]},
        "sweeps": [{
            "layer": None, "position": "thinking", "problems": 2, "draws": 1, "plain": dose, "direction": [dose],
            "random": [dose],
        }],
        "arms": {"subgroup": "quick", "problems": 2, "samples": 1, "report": arms, "selection": arms},
        "completions": {"rule": "r", "site": "L1.resid_post", "midpoint": 0.0, "scale": 1.0, "examples": [example]},
        "provenance": {
            "model": Recipe.of(organism(), []).model, "task": "chains", "sampling": asdict(Sampling()),
            "splits": {"probe": "p", "select": "s", "report": "r"}, "seeds": {"sampling": 0}, "estimator": "e",
            "data": "d", "versions": {"python": "3"}, "command": "c",
        },
    }  # fmt: skip


def _read_report(file: Path) -> object:
    return write_report(file.parent, file.parent / "report.html")


def _plain(text: str, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


TARGETS = (
    Target("recipe words", _recipe("recipe.yaml"), _read_recipe, "yaml", 2),
    Target("recipe tensors", _recipe("recipe.safetensors"), _read_recipe, "safetensors"),
    Target("recipe of version 1", _recipe_1, _read_recipe, "yaml"),
    Target("autoencoder config", _autoencoder("cfg.json"), _read_autoencoder, "json"),
    Target("autoencoder tensors", _autoencoder("sae_weights.safetensors"), _read_autoencoder, "safetensors"),
    Target("autoencoder of sparsify", _autoencoder_of_sparsify, _read_autoencoder, "json", 0.5),
    Target("pickled autoencoder", _autoencoder_pickled, _read_autoencoder, "bytes", 0.5),
    Target("direction", _direction, _read_direction, "safetensors", 2),
    Target("direction of version 0.1", _direction_0_1, _read_direction, "safetensors"),
    Target("completions", _completions, _read_completions, "lines", 2),
    Target("completions appended to", _completions, _append, "lines"),
    Target("store", _store, _read_store, "lines"),
    Target("holder of a store", _held, _read_holder, "json", 0.5),
    Target("texts", _texts, lambda file: text_spans(organism(), file), "lines"),
    Target("tasks", _tasks, lambda file: task_named(str(file)).sample(1, "train"), "lines"),
    Target("delta words", _delta("delta.yaml"), _read_delta, "yaml"),
    Target("delta tensors", _delta("delta.safetensors"), _read_delta, "safetensors"),
    Target("delta numbers", _delta("delta.safetensors"), _read_tensors_of_delta, "safetensors"),
    Target("linked delta", _delta("delta.yaml", linked=True), _read_delta, "yaml"),
    Target("linked delta of checkpoints", _sum, _read_delta, "yaml", 0.5),
    Target("adapter config", _adapter("adapter_config.json"), _read_adapter, "json"),
    Target("adapter config as a delta", _adapter("adapter_config.json"), _read_delta, "json"),
    Target("adapter tensors", _adapter("adapter_model.safetensors"), _read_adapter, "safetensors"),
    Target("checkpoint tensors", _checkpoint("model.safetensors"), _read_checkpoint, "safetensors"),
    Target("checkpoint config", _checkpoint("config.json"), _read_checkpoint, "json"),
    Target("checkpoint index", _checkpoint("model.safetensors.index.json", size="80KB"), _read_checkpoint, "json"),
    Target("checkpoint vocabulary", _checkpoint("tokenizer.json"), _read_vocabulary, "json"),
    Target("diff of tensors", _checkpoint("model.safetensors"), _read_diff, "safetensors", 0.3),
    Target("diff by an index", _checkpoint("model.safetensors.index.json", size="80KB"), _read_diff, "json", 0.3),
    Target("model's config", _checkpoint("config.json"), _read_model, "json", 0.5),
    Target("model's tensors", _checkpoint("model.safetensors"), _read_model, "safetensors", 0.5),
    Target("model's generation config", _checkpoint("generation_config.json"), _read_model, "json", 0.3),
    Target("model's tokenizer", _checkpoint("tokenizer.json"), _read_model, "json", 0.5),
    Target("model's tokenizer config", _checkpoint("tokenizer_config.json"), _read_model, "json", 0.5),
    Target("model's chat template", _checkpoint("chat_template.jinja"), _read_model, "bytes", 0.3),
    Target("progress of a stream", _progress, _read_progress, "json"),
    Target("gguf vectors", _gguf, _neighbour_read, "bytes", 2),
    Target("head of a gguf model", gguf_head, check_gguf, "bytes"),
    Target("easysteer", _neighbour("easysteer"), _neighbour_read, "json", 2),
    Target("easysteer with a source", _easysteer_source, _read_source, "json"),
    Target("vllm-lens", _neighbour("vllm-lens"), _neighbour_read, "json", 2),
    Target("vllm-lens by name", _neighbour("vllm-lens"), _named("vllm-lens"), "json"),
    Target("lm-eval", _neighbour("lm-eval"), _neighbour_read, "bytes", 2),
    Target("run record", _run_json, _read_report, "json"),
    Target("any JSON", _plain('{"a": [1, 2.5, {"b": null}]}', "x.json"), read_json, "json"),
    Target("any YAML", _plain("a: [1, 2.5, {b: null}]\nc: text\n", "x.yaml"), read_yaml, "yaml"),
    Target("any lines", _plain('{"a": 1}\n{"b": [2]}\n', "x.jsonl"), lambda file: list(read_json_lines(file)), "lines"),
    Target("any safetensors", _direction, read_tensors, "safetensors"),
)
