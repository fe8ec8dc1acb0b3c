"""Rows leave a batch and join it, and nothing else changes: tokens, events, logs, counts are as of each row alone."""

import pytest
import torch
from families import FAMILIES, UNLISTED_MOE, build, build_tokenizer
from tiny import tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, MinPLogitsWarper

from probes import Site, load
from probes.activations import counting
from probes.generation import _batch, caches, generate
from probes.generation.sampling import Sampling, row_key
from probes.model.hooks import hook_site
from probes.model.loading import tokenizer_of
from probes.model.tokens import encode_prompt
from probes.rows import Remembered, Rows
from steer import Add, Condition, Controller, Recipe, Scope, applied
from steer.decoding import Budget, BudgetForcing, CloseBias, Controlled, Converge, Processors, Together

WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=16)
ENDS = [2, *range(20, 32)]  # so many that most rows end early, each in its own time
PROMPTS = [" ".join(f"w{7 + (3 * i + j) % 80}" for j in range(1 + (5 * i) % 9)) for i in range(11)]
CHAINS = [f"a {k} b +{k} c *7{end}" for k in range(2, 9) for end in ("", " quick", " d -2 e +5")]
WINDOWS = ("mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss")
NOISE = torch.randn(96, generator=torch.Generator().manual_seed(0))
HYBRIDS = (
    "bailing_hybrid",
    "kimi_linear",
    "helium",
    "deepseek_v32",
    "doge",
)  # layers that are no attention, or not plain


def by_transformers(model, prompt, sampling, sample):
    """The new tokens of a row, by transformers' own loop, alone."""
    ids = encode_prompt(tokenizer_of(model), prompt)
    draw = sampling.processors([row_key(ids, sampling.seed, sample)], [len(ids)], torch.device("cpu"))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )  # fmt: skip
    x = torch.tensor([ids])
    out = model.generate(x, attention_mask=torch.ones_like(x), generation_config=config, logits_processor=draw)
    return tuple(out[0, len(ids) :].tolist())


@pytest.fixture
def moves(monkeypatch):
    """How many rows joined each time, as batches are written."""
    seen, turn = [], _batch.Batch.turn

    def noted(self, rows, *, trim):
        seen.append(len(rows))
        return turn(self, rows, trim=trim)

    monkeypatch.setattr(_batch.Batch, "turn", noted)
    return seen


def check(model, moves, *, joins=True):
    model.generation_config.eos_token_id = ENDS
    found = generate(model, PROMPTS, sampling=WARM, samples=2, batch_size=4)
    assert [c.ids for c in found] == [by_transformers(model, p, WARM, i) for p in PROMPTS for i in (0, 1)]
    assert len({len(c.ids) for c in found}) > 5
    assert joins is None or any(moves) == joins


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED_MOE])
def test_every_row_is_what_transformers_writes_for_it_alone(family, moves):
    check(build(family), moves)


@pytest.mark.parametrize("family", WINDOWS)
def test_rows_come_and_go_in_a_sliding_window(family, moves):
    model = build(family)
    config = AutoConfig.for_model(**{**model.config.to_dict(), "sliding_window": 6})
    windowed = AutoModelForCausalLM.from_config(config).eval()
    windowed.load_state_dict(model.state_dict())
    check(load(windowed, tokenizer=build_tokenizer()), moves)


@pytest.mark.parametrize("model_type", [own for own in HYBRIDS if own in CONFIG_MAPPING])  # 5.19 lacks the first
def test_rows_are_right_in_other_layers_whether_they_may_move_or_not(model_type, moves):
    check(load(tiny_model(model_type), tokenizer=build_tokenizer()), moves, joins=None)


def test_rows_stay_where_the_cache_is_unknown(moves, monkeypatch):
    monkeypatch.setattr(caches, "_KNOWN", ())
    check(build("llama"), moves, joins=False)


def test_rows_stay_together_where_a_setting_counts_their_steps(moves):
    model = build("llama")
    model.generation_config.min_new_tokens = 4
    model.generation_config.eos_token_id = ENDS
    alone = generate(model, PROMPTS, sampling=WARM, batch_size=1)
    assert generate(model, PROMPTS, sampling=WARM, batch_size=4) == alone
    assert min(len(c.ids) for c in alone) > 4
    assert not any(moves)


CONTROLS = (
    Budget(thinking=8),
    Together((Budget(thinking=14, solution=2), BudgetForcing(2))),
    CloseBias(-2.0, until=9),
    Together((BudgetForcing(9), Converge(2, every=3))),
)


@pytest.mark.parametrize("control", CONTROLS, ids=str)
def test_controls_go_with_their_rows(control, moves):
    model = load("organism")
    sampling = Sampling.of(model, max_new_tokens=40)
    one, many = (
        generate(model, CHAINS, sampling=sampling, decoding=Controlled(model, control), samples=2, batch_size=size)
        for size in (1, 6)
    )
    assert one == many
    assert any(c.events for c in many) or isinstance(control, CloseBias)
    assert any(moves)


def test_a_control_that_does_not_say_it_can_keeps_its_batch(moves):
    class MinP:
        def processors(self, model, rows):  # noqa: ARG002
            return Processors(before=(MinPLogitsWarper(0.1),))

    model = load("organism")
    one, many = (
        generate(
            model, CHAINS, decoding=Controlled(model, MinP()), sampling=Sampling(max_new_tokens=40), batch_size=size
        )
        for size in (1, 6)
    )
    assert [c.ids for c in one] == [c.ids for c in many]
    assert not any(moves)


@pytest.mark.parametrize(
    "scope",
    [
        Scope(),
        Scope("answer"),
        Scope("thinking", window=(2, 6)),
        Scope("thinking", controller=Controller(10)),
        Scope("thinking", condition=Condition(Site(1, "resid_post"), NOISE, 0.0)),
    ],
    ids=str,
)
def test_scopes_logs_and_counters_go_with_their_rows(scope, moves):
    model = load("organism")
    recipe = Recipe.of(model, [Add(Site(2, "resid_post"), NOISE, 0.7)], scope=scope)
    told, ratios = [], []
    for size in (1, 6):
        with applied(model, recipe) as log, counting(model, ["Okay"]) as counts:
            done = generate(model, CHAINS, sampling=Sampling.of(model, max_new_tokens=40), samples=2, batch_size=size)
        told.append((done, log.positions(), log.tokens, counts.counts.tolist(), counts.tokens.tolist()))
        ratios.append(log.mean_ratio())
    assert told[0] == told[1]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
    assert len(told[0][1]) == 2 * len(CHAINS)
    assert any(moves)


def test_a_row_that_is_spent_leaves_at_once():
    """Learned positions end where the limit is: nobody is written beyond it."""
    model = build("gpt2")
    model.generation_config.eos_token_id = [96]
    longest = max(len(encode_prompt(tokenizer_of(model), p)) for p in PROMPTS)
    sampling = Sampling(temperature=1.0, max_new_tokens=128 - longest)
    done = generate(model, PROMPTS, sampling=sampling, batch_size=4)
    assert {len(c.ids) for c in done if c.stop == "length"} == {128 - longest}


def test_no_pass_keeps_a_graph():
    """Prompts of the first rows, their steps, and prompts of those who join."""
    model, seen = build("llama"), []
    model.generation_config.eos_token_id = ENDS
    assert all(parameter.requires_grad for parameter in model.parameters())
    with hook_site(model, Site(1, "resid_post"), lambda x: seen.append(x.requires_grad)):
        generate(model, PROMPTS, sampling=WARM, batch_size=4)
    assert len(seen) > 20
    assert not any(seen)


def test_a_state_goes_with_its_rows():
    memory = Remembered((torch.tensor([1, 2, 3]), ["a", "b", "c"]))
    run = object()
    memory.begin(Rows(run, (0, 1, 2), (4, 4, 4)), memory.state)
    memory.begin(Rows(run, (3, 4), (5, 5), joining=True), (torch.tensor([4, 5]), ["d", "e"]))
    assert memory.turn(Rows(run, (4, 0, 2), (6, 6, 6)))
    assert memory.state[0].tolist() == [5, 1, 3]
    assert memory.state[1] == ["e", "a", "c"]
    assert not memory.turn(memory.rows)
