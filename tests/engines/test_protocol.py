"""One set of laws for every engine: `generate` and `evaluate` write with any; a store knows which; what one cannot do
is refused. Where vLLM is installed (`make vllm`), it is one of them."""

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes import Sampling, Site, generate, load
from probes.directions import AnswerProbe
from probes.engines import Engine, Written
from probes.generation._batch import Transformers
from probes.model import Delimiters, tokenizer_of
from probes.model.passes import edits_of
from steer import Add, Recipe, Scale, applied, evaluate, task_named
from steer.decoding import Budget, BudgetForcing, Controlled, EarlyExit, Together
from steer.runtime import NeverFired

GREEDY = Sampling(temperature=0, max_new_tokens=24)
HOT = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=24, seed=3)
PROMPTS = ["a 3 b +4 c *7", "a 3 b +4 c *7 quick", "a 5 b -2"]


class Backwards(Transformers):
    """Writes with transformers, one row at a time, the last first; the answer is the same."""

    name = "backwards"

    def __init__(self):
        self.passes = 0

    def check(self, model, sampling, decoding):  # noqa: ARG002
        if decoding is not None and "Exit" in decoding.name:
            raise ValueError(f"{decoding.name} reads the model's passes, which are Backwards's own.")

    def write(self, model, rows, sampling, decoding, *, batch_size, run):
        for row in reversed(rows):
            self.passes += 1
            for part in super().write(model, [row], sampling, decoding, batch_size=batch_size, run=run):
                yield [replace(own, ids=[*own.ids, *[9, 9] * (own.ids[-1] == 2)]) for own in part]  # behind the end


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random, with the organism's words, and heads as wide as vLLM wants them on a CPU. What it likes to write opens
    and closes its thinking."""
    folder, organism = tmp_path_factory.mktemp("model"), load("organism")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of(organism).save_pretrained(folder)
    free = load(str(folder), dtype=torch.float32)
    written = [c.ids for c in generate(free, PROMPTS, sampling=HOT, samples=16)]
    (opens, _), *_ = Counter(token for ids in written for token in ids[:4] if token > 5).most_common()
    closes, _ = max(
        Counter(token for ids in written for token in ids[5:] if token > 5 and token != opens).items(),
        key=lambda found: found[1],
    )
    return load(str(folder), dtype=torch.float32, delimiters=Delimiters((opens,), (closes,), (5,), (1,)))


@pytest.fixture(scope="module")
def recipes(model):
    made = torch.Generator().manual_seed(5)
    vector = torch.randn(96, generator=made)
    return {
        "pushed": Recipe.of(model, [Add(Site(1, "resid_post"), vector / vector.norm(), 3.0)], scope="thinking"),
        "halved": Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.2)]),
    }


@pytest.fixture(scope="module")
def engines(model, recipes):
    made = {"transformers": Transformers(), "backwards": Backwards()}
    if find_spec("vllm") is not None:
        from steer.engines.vllm import VLLM

        with VLLM(model, recipes, block_size=32) as engine:
            yield {**made, "vllm": engine}
    else:
        yield made


@pytest.fixture(params=["transformers", "backwards", *(["vllm"] if find_spec("vllm") is not None else [])])
def engine(request, engines):
    return engines[request.param]


def test_each_is_an_engine_and_writes_what_the_model_writes(model, engine):
    assert isinstance(engine, Engine)
    plain = generate(model, PROMPTS, sampling=GREEDY)
    assert generate(model, PROMPTS, sampling=GREEDY, engine=engine) == plain
    assert {c.stop for c in plain} | {c.stop for c in generate(model, PROMPTS, sampling=HOT, samples=8)} == {
        "eos",
        "length",
    }


@pytest.mark.parametrize("sampling", [HOT, replace(HOT, top_k=5, min_p=0.05, top_p=1.0)])
def test_a_draw_belongs_to_prompt_and_sample(model, engine, sampling):
    plain = generate(model, PROMPTS, samples=8, sampling=sampling)
    assert len({c.ids for c in plain}) > 16
    assert generate(model, PROMPTS, samples=8, sampling=sampling, engine=engine) == plain
    assert generate(model, PROMPTS, samples=8, sampling=sampling, engine=engine, batch_size=2) == plain


@pytest.mark.parametrize("name", ["pushed", "halved"])
def test_a_recipe_that_is_applied_is_followed_and_known_to_have_fired(model, engine, recipes, name):
    plain = generate(model, PROMPTS, sampling=GREEDY)
    with applied(model, recipes[name]):
        steered = generate(model, PROMPTS, sampling=GREEDY)
    assert [c.ids for c in steered] != [c.ids for c in plain]
    with applied(model, recipes[name], must_run=False):
        assert generate(model, PROMPTS, sampling=GREEDY, engine=engine) == steered
    assert generate(model, PROMPTS, sampling=GREEDY, engine=engine) == plain


def test_a_recipe_that_touches_nothing_is_told(model, engine, recipes):
    with pytest.raises(NeverFired), applied(model, recipes["pushed"], must_run=False):
        generate(model, ["a 3"], sampling=GREEDY, engine=engine, template="raw")  # it never begins to think


@pytest.mark.parametrize(
    "control", [Budget(thinking=5), Budget(3, 6), Together((Budget(12), BudgetForcing(1)))], ids=str
)
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "drawn"])
def test_controls_decide_the_same_tokens_and_note_the_same(model, engine, control, sampling):
    write = {"sampling": sampling, "samples": 1 if sampling is GREEDY else 4, "decoding": Controlled(model, control)}
    plain = generate(model, PROMPTS, **write)
    assert any(c.events for c in plain)
    assert generate(model, PROMPTS, engine=engine, **write) == plain


def test_a_repetition_penalty_is_honoured(model, engine):
    plain = generate(model, PROMPTS, sampling=HOT)
    model.generation_config.repetition_penalty = 1.5
    try:
        penalised = generate(model, PROMPTS, sampling=HOT, batch_size=1)
        assert generate(model, PROMPTS, sampling=HOT, engine=engine) == penalised != plain
    finally:
        model.generation_config.repetition_penalty = None


def test_evaluation_is_the_same(model, engine, recipes, tmp_path):
    task = task_named("chains")
    problems = task.sample(6, "report")
    arms = {**recipes, "budget": Budget(thinking=4)}
    own = evaluate(model, task, problems, arms, sampling=HOT, engine=engine, store=tmp_path)
    assert own.to_dict() == evaluate(model, task, problems, arms, sampling=HOT).to_dict()


def test_what_an_engine_cannot_do_is_refused_before_anything_is_written(model, engine, tmp_path):
    if engine.name == "transformers":
        pytest.skip("it does all")
    probe = AnswerProbe(Site(2, "resid_post"), torch.zeros(96), offset=1.0, n=90)
    control = Controlled(model, EarlyExit(probe, rules="organism"))
    with pytest.raises(ValueError, match="reads the model's passes"):
        generate(model, PROMPTS, engine=engine, decoding=control, store=tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_recipe_that_vllm_was_not_started_with_and_other_weights_are_refused(model, engines):
    if "vllm" not in engines:
        pytest.skip("needs vLLM: make vllm")
    other = Recipe.of(model, [Scale(Site(1, "mlp_out"), 0.5)])
    with pytest.raises(ValueError, match="Known: pushed, halved"), applied(model, other, must_run=False):
        generate(model, PROMPTS, sampling=GREEDY, engine=engines["vllm"])
    with pytest.raises(ValueError, match="holds other weights than 'organism'"):
        generate(load("organism"), PROMPTS, sampling=GREEDY, engine=engines["vllm"])


def test_a_store_knows_the_engine(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    generate(model, PROMPTS, sampling=GREEDY, store=path, engine=(first := Backwards()))
    generate(model, PROMPTS, sampling=GREEDY, store=path, engine=(second := Backwards()))
    assert (first.passes, second.passes) == (3, 0)
    with pytest.raises(ValueError, match="by other weights, or under another recipe"):
        generate(model, PROMPTS, sampling=GREEDY, store=path)


def test_an_engine_sees_the_recipe_that_is_applied(model, recipes):
    seen = []

    class Asking(Backwards):
        def check(self, model, sampling, decoding):  # noqa: ARG002
            seen.append(edits_of(model))

    with applied(model, recipes["halved"]):
        generate(model, PROMPTS[:1], sampling=GREEDY, engine=Asking())
    assert seen == [(recipes["halved"].fingerprint(),)]


def test_without_vllm_its_engine_says_what_to_install(model):
    if find_spec("vllm") is not None:
        pytest.skip("it is installed")
    from steer.engines.vllm import VLLM

    with pytest.raises(ImportError, match=r"vllm and thinksteer-vllm are not installed: pip install vllm"):
        VLLM(model)


def test_written_is_what_an_engine_gives_back():
    assert Written.__dataclass_fields__.keys() == {"row", "ids", "events"}
