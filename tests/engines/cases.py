"""What is asked of both engines: tiny random models, recipes of every kind, scope and site; Hugging Face's answers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from probes import Site, load
from probes.model import Delimiters
from steer import Ablate, Add, Clamp, Controller, Recipe, Rotate, Scale, Schedule, Scope, Step, applied

N_NEW, D_MODEL, N_LAYERS = 32, 96, 4
BASE = {
    "vocab_size": 97, "hidden_size": D_MODEL, "intermediate_size": 160, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = ("llama", "qwen3")
THIRDS = tuple(range(9, 97, 3))
HEADER, USER, OPEN = (5, 6), (1, 7), (3, 8)


def build(family: str, folder: Path) -> PreTrainedModel:
    """A random model that thinks for a while: what it is likely to write is what opens and closes the thinking."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    delimiters = Delimiters(OPEN, (free_close(model),), HEADER, USER)
    return load(str(folder), dtype=torch.float32, delimiters=delimiters)


def free_close(model: PreTrainedModel) -> int:
    """A token that it writes before long, behind the opening delimiter."""
    written = []
    for ids in prompts():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, suppress_tokens=[0]
        )
        written.append(out[0, len(ids) + 8 :].tolist())
    return next(token for row in written for token in row if token not in (*HEADER, *USER, *OPEN))


def free(model: PreTrainedModel, ids: list[int], n: int) -> list[int]:
    """Greedily written. Never the pad, which a batch's clock takes for none."""
    given = torch.tensor([ids])
    out = model.generate(given, max_new_tokens=n, do_sample=False, eos_token_id=None, suppress_tokens=[0])
    own: list[int] = out[0, len(ids) :].tolist()
    return own


def prompts(close: int = 4) -> list[list[int]]:
    """Of one turn and of two, of several lengths; the thinking is open at their ends, but in one it never was.

    Of the last, what a cache holds ends within the thinking.
    """
    made = torch.Generator().manual_seed(1)

    def words(n: int) -> list[int]:
        return torch.randint(9, 97, (n,), generator=made).tolist()

    return [
        [*USER, *words(9), *HEADER, *OPEN],
        [*USER, *words(30), *OPEN, *words(5), *HEADER, *words(3), *OPEN, *words(4)],
        [*USER, *words(12), *HEADER, *OPEN, *words(9), close, *words(6), *USER, *words(39), *HEADER, *OPEN, *words(2)],
        [*USER, *words(17), *HEADER, *words(4)],
        [*USER, *words(6), *HEADER, *OPEN, *words(38)],
    ]  # fmt: skip


def scopes() -> dict[str, Scope]:
    """Of the thinking, by what they ask."""
    return {
        "after": Scope("thinking", after=2, markers=tuple((t,) for t in range(10, 97, 2))),
        "window": Scope("thinking", window=(2, 9)),
        "linear": Scope("thinking", schedule=Schedule("linear", start=1.0, end=-0.5, over=12)),
        "cosine": Scope("thinking", schedule=Schedule("cosine", start=0.0, end=1.0, over=9), window=(1, None)),
        "step": Scope("thinking", schedule=Schedule("step", start=1.0, end=0.3, over=5)),
        "controller": Scope("thinking", controller=Controller(set_point=7.0)),
        "listed": Scope("thinking", tokens=THIRDS),
    }


def recipes(model: PreTrainedModel) -> dict[str, Recipe]:
    """By name. Every kind, every site, every scope that ids and positions can tell."""
    made = torch.Generator().manual_seed(2)

    def v(width: int = D_MODEL) -> torch.Tensor:
        vector = torch.randn(width, generator=made)
        return vector / vector.norm()

    def at(layer: int, name: Any, head: int | None = None) -> Site:
        return Site(layer, name, head=head)

    thinking = scopes()
    own: dict[str, list[tuple[Any, str | Scope]]] = {
        "add": [(Add(at(1, "resid_post"), v(), 3.0), "all")],
        "add-pre": [(Add(at(0, "resid_pre"), v(), 1.0), "thinking"), (Add(at(2, "resid_pre"), v(), 2.0), "answer")],
        "ablate-mid": [(Ablate(at(2, "resid_mid"), v(), target=2.0), "thinking")],
        "ablate": [(Ablate(at(1, "resid_post"), v(), target=-9.0), thinking["listed"])],
        "scale-mlp": [(Scale(at(1, "mlp_out"), 0.2), "all")],
        "scale-attn": [(Scale(at(2, "attn_out"), 2.5), "prompt"), (Scale(at(0, "attn_out"), 0.0), "answer")],
        "clamp": [(Clamp(at(1, "resid_post"), v(), low=1.5, high=2.0), thinking["window"])],
        "clamp-mlp": [(Clamp(at(2, "mlp_out"), v(), 1.5, low=0.6), "all")],
        "rotate": [(Rotate(at(2, "resid_post"), v(), 6.0), thinking["linear"])],
        "rotate-mid": [(Rotate(at(1, "resid_mid"), v(), 4.0), "answer")],
        "z": [(Add(at(1, "z"), v(128), 2.0), "thinking"), (Scale(at(1, "z", 2), 0.0), "all")],
        "head": [(Rotate(at(2, "z", 0), v(32), 2.0), thinking["step"]), (Ablate(at(2, "z", 3), v(32)), "prompt")],
        "result": [(Scale(at(1, "result", 1), -1.0), "thinking"), (Add(at(1, "result", 3), v(), 2.0), "prompt")],
        "cosine": [(Add(at(2, "resid_post"), v(), 6.0), thinking["cosine"])],
        "controller": [(Ablate(at(2, "attn_out"), v(), 1.0, target=3.0), thinking["controller"])],
        "after": [(Add(at(0, "mlp_out"), v(), 4.0), thinking["after"])],
        "tokens": [(Add(at(1, "attn_out"), v(), 3.0), Scope("all", tokens=THIRDS))],
        "one-place": [
            (Add(at(1, "resid_post"), v(), 3.0), "thinking"), (Ablate(at(1, "resid_post"), v()), "all"),
            (Rotate(at(1, "resid_post"), v(), 3.0), thinking["window"]), (Scale(at(1, "resid_post"), 1.3), "prompt"),
            (Clamp(at(1, "resid_post"), v(), high=-0.5), thinking["step"]),
        ],
        "everywhere": [
            (Add(at(3, "resid_post"), v(), 2.0), "answer"), (Add(at(3, "resid_pre"), v(), 1.0), "thinking"),
            (Scale(at(0, "z", 1), 0.5), "all"), (Clamp(at(2, "resid_mid"), v(), low=0.5), "prompt"),
            (Ablate(at(3, "mlp_out"), v()), thinking["linear"]),
            (Add(at(0, "result", 0), v(), 0.7), thinking["listed"]),
        ],
    }  # fmt: skip
    identity = Recipe.of(model, []).model
    return {
        name: Recipe(tuple(Step(edit, Scope.of(scope)) for edit, scope in steps), identity)
        for name, steps in own.items()
    }


@dataclass(frozen=True)
class Answer:
    """What Hugging Face writes, and how many tokens each step touched in each phase."""

    ids: list[int]
    fired: dict[tuple[int, str], int] = field(default_factory=dict)


def answer(model: PreTrainedModel, ids: list[int], recipe: Recipe | None) -> Answer:
    if recipe is None:
        return Answer(free(model, ids, N_NEW))
    with applied(model, recipe, must_fire=False) as log:
        written = free(model, ids, N_NEW)
    return Answer(written, {(row[0], row[4]): row[5] for row in log.table().rows if row[4] != "never"})


def stronger(recipe: Recipe, strength: float) -> Recipe:
    from dataclasses import replace

    steps = (
        replace(s, intervention=replace(s.intervention, strength=strength * s.intervention.strength))
        for s in recipe.steps
    )
    return replace(recipe, steps=tuple(steps))


def requests(rows: Iterator[tuple[list[int], dict[str, Any] | None]]) -> list[dict[str, Any]]:
    more = {"logit_bias": {0: -100.0}}  # never the pad
    return [{"ids": ids, "n": N_NEW, "xargs": xargs, "more": more} for ids, xargs in rows]
