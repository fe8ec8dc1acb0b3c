"""What a model writes belongs to the prompt, the sample and the seed: not to the batch or the order."""

import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import build, build_tokenizer
from scipy.stats import chisquare

from probes.generation._batch import Transformers
from probes.generation._generate import generate
from probes.generation.completions import Completion, by_problem, read_completions, write_completions
from probes.generation.sampling import GumbelNoise, Sampling, row_key
from probes.generation.store import Store
from probes.model.delimiters import ThinkingSpan
from probes.model.loading import load, tokenizer_of
from probes.model.tokens import decode, encode_prompt

GREEDY = Sampling(temperature=0, max_new_tokens=12)
WARM = Sampling(temperature=0.7, top_p=1.0, max_new_tokens=48)
CHAINS = [
    "a 3 b +4 c *7", "a 5 b -2", "a 1 b +9 c *3 d -4 e +6 quick", "a 8 b *9 c +1 d +1", "a 0 b +5 c -3 quick",
    "a 7 b *3", "a 2 b -8 c *7 d +2 e -1 f +3 g *9 h +4",
]  # fmt: skip
LOGITS = torch.tensor([1.5, 0.0, -1.0, 0.7, -torch.inf, 2.0, 0.3, -2.0, -torch.inf])


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def draws(sampling, n, step=0, logits=LOGITS):
    """How often each token is drawn over n rows with the same logits and keys of their own."""
    ids = torch.zeros(n, 3 + step, dtype=torch.long)
    keys = [row_key([i], 0, 0) for i in range(n)]
    rows = sampling.processors(keys, [3] * n, ids.device)(ids, logits.expand(n, -1).clone())
    return torch.bincount(rows.argmax(1), minlength=len(logits))


def fits(counts, shares):
    """Whether draws with these shares are as far off as the counts more than once in a thousand times."""
    expected = counts.sum() * shares.double()
    return chisquare(counts, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("sampling", [WARM, replace(WARM, temperature=0)], ids=["warm", "greedy"])
def test_batch_size_and_order_change_nothing(organism, sampling):
    names = [f"p{i}" for i in range(len(CHAINS))]
    write = partial(generate, organism, sampling=sampling, samples=2)
    whole = write(CHAINS, ids=names)
    assert [(c.id, c.sample) for c in whole] == [(name, sample) for name in names for sample in (0, 1)]
    for size in (1, 3):
        assert write(CHAINS, ids=names, batch_size=size) == whole
    order = random.Random(0).sample(range(len(CHAINS)), len(CHAINS))
    mixed = write([CHAINS[i] for i in order], ids=[names[i] for i in order], batch_size=3)
    assert by_problem(mixed) == by_problem(whole)


def test_batch_size_changes_nothing_on_a_random_model():
    model = build("qwen3")
    prompts = ["w7 w8 w9", "w10", "w11 w12 w13 w14 w15 w16", "w17 w18"]
    for sampling in (GREEDY, Sampling(temperature=1.0, top_p=0.9, top_k=20, max_new_tokens=12)):
        whole = generate(model, prompts, sampling=sampling)
        assert len({c.ids for c in whole}) == len(prompts)
        for size in (1, 3):
            assert generate(model, prompts, sampling=sampling, batch_size=size) == whole


@torch.no_grad()
def test_greedy_is_the_greedy_search_of_hugging_face(organism):
    for model, prompts in ((organism, CHAINS), (build("gemma2"), ["w7 w8", "w9"])):
        for ours in generate(model, prompts, sampling=GREEDY):
            ids = torch.tensor([ours.prompt_ids])
            mask = torch.ones_like(ids)
            theirs = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
            assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("step", [0, 5])
def test_draws_follow_the_softmax_and_never_take_what_is_impossible(temperature, step):
    counts = draws(Sampling(temperature=temperature, top_p=1.0), 20_000, step)
    expected = (LOGITS / temperature).softmax(0)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert fits(counts[possible], expected[possible])


def test_two_steps_of_one_row_are_independent_draws():
    noise, n = GumbelNoise(torch.tensor([row_key([1], 0, 0)]), torch.tensor([0])), 6_000
    drawn = [int(noise(torch.zeros(1, step, dtype=torch.long), LOGITS[None]).argmax()) for step in range(n)]
    pairs, share = Counter(zip(drawn[::2], drawn[1::2], strict=True)), LOGITS.softmax(0).tolist()
    common = [(a, b) for a in (0, 3, 5) for b in (0, 3, 5)]
    hook_site = [pairs[pair] for pair in common]
    expected = [n / 2 * share[a] * share[b] for a, b in common]
    rest = n / 2 - sum(hook_site), n / 2 - sum(expected)
    assert fits(torch.tensor([*hook_site, rest[0]]), torch.tensor([*expected, rest[1]]) / (n / 2))


def test_top_k_and_top_p_restrict_the_support_and_keep_the_proportions():
    order = LOGITS.argsort(descending=True)
    mass = LOGITS.softmax(0)[order].cumsum(0)
    for sampling, kept in (
        (Sampling(temperature=1.0, top_p=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_p=0.8), int((mass < 0.8).sum()) + 1),  # the fewest that hold 0.8
        (Sampling(temperature=1.0, top_p=0.8, top_k=2), 2),
    ):
        counts, support = draws(sampling, 10_000), order[:kept]
        assert counts[support].sum() == 10_000
        assert fits(counts[support], LOGITS[support].softmax(0))


def test_padding_counts_as_nothing_that_was_said():
    """A repetition penalty would make the pad, which is often the end, less likely in rows that are padded."""
    model = build("llama")
    model.generation_config.repetition_penalty = 3.0
    with torch.no_grad():
        model.lm_head.weight[0] = model.lm_head.weight[2]  # the pad is as likely as the end
    prompts = ["w7", "w7 w8 w9 w10 w11 w12 w13 w14"]
    sampling = Sampling(temperature=1.5, top_p=1.0, max_new_tokens=24)
    whole = generate(model, prompts, sampling=sampling, samples=40)
    assert whole == generate(model, prompts, sampling=sampling, samples=40, batch_size=1)
    assert sum(0 in c.ids for c in whole) > 5


def test_samples_differ_the_same_seed_repeats_and_another_does_not():
    model = build("llama")

    def write(seed):
        sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=seed)
        return [c.ids for c in generate(model, ["w7", "w8"], sampling=sampling, samples=4)]

    assert len(set(write(0))) == 8
    assert write(0) == write(0)
    assert not set(write(0)) & set(write(1))


def test_a_model_is_sampled_by_its_own_generation_config(organism):
    assert Sampling.of(organism) == Sampling(temperature=0.7, top_p=1.0)
    assert Sampling.of(build("llama"), seed=3) == Sampling(temperature=0.6, top_p=0.95, seed=3)


def test_a_completion_ends_with_its_stop_token_or_at_the_length(organism):
    for c in generate(organism, CHAINS, sampling=Sampling(temperature=0, max_new_tokens=2)):
        assert (c.stop, c.truncated, len(c.ids), c.span.closed) == ("length", True, 2, False)
        assert (c.thinking_tokens, c.answer) == (2, "")
    for c in generate(organism, CHAINS, sampling=WARM):
        assert (2 in c.ids) == (c.stop == "eos") == (not c.truncated)
        assert 2 not in c.ids[:-1]


def test_thinking_and_answer_are_cut_at_the_delimiters_and_thinking_tokens_count_both(organism):
    tokenizer = tokenizer_of(organism)
    completions = generate(organism, CHAINS, sampling=WARM)
    for c in completions:
        start, end = c.ids.index(3), c.ids.index(4)
        assert c.thinking_tokens == end - start + 1
        assert c.thinking == decode(tokenizer, c.ids[start + 1 : end])
        assert c.answer == decode(tokenizer, c.ids[end + 1 :], special=False)
        assert c.all_ids == (*encode_prompt(tokenizer, CHAINS[int(c.id)]), *c.ids)
    off = generate(organism, CHAINS, sampling=WARM, template={"enable_thinking": False})
    assert {(c.thinking, c.thinking_tokens, c.prompt_ids[-2:]) for c in off} == {(None, 0, (3, 4))}
    assert [c.answer for c in off] == [decode(tokenizer, c.ids, special=False) for c in off]


def test_thinking_that_never_closes_lasts_to_the_end_and_the_stop_token_is_none_of_it():
    model, warm = build("llama"), Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24)
    completions = generate(model, ["w7"], sampling=warm, samples=40, template={"open_thinking": True})
    for c in completions:
        said = c.ids[:-1] if c.stop == "eos" else c.ids
        assert c.thinking_tokens == (said.index(4) + 1 if 4 in said else len(said))
    assert {(4 in c.ids, c.stop) for c in completions} >= {(False, "eos"), (True, "length")}


def test_what_a_killed_run_stored_is_not_generated_again(organism, tmp_path, monkeypatch):
    store, write, made = tmp_path / "completions.jsonl", Transformers.write, []
    whole = generate(organism, CHAINS, sampling=WARM, batch_size=1)

    def noted(engine, model, rows, *rest, **options):
        if len(made) == kill_after:
            raise KeyboardInterrupt
        made.extend(row.name for row in rows)
        return write(engine, model, rows, *rest, **options)

    monkeypatch.setattr(Transformers, "write", noted)
    kill_after = 4  # rows, which are written together
    with pytest.raises(KeyboardInterrupt):
        generate(organism, CHAINS, sampling=WARM, batch_size=1, store=store)
    kill_after = None
    assert generate(organism, CHAINS, sampling=WARM, batch_size=1, store=store) == whole
    assert sorted(made) == sorted(c.id for c in whole)
    assert generate(organism, CHAINS, sampling=WARM, store=store) == whole
    assert sorted(made) == sorted(c.id for c in whole)


def test_a_run_that_was_killed_amid_its_rows_ends_with_the_same_bytes(organism, tmp_path, monkeypatch):
    whole, killed, add = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", Store.add
    generate(organism, CHAINS, sampling=WARM, samples=3, batch_size=3, store=whole)

    def dies(self, completions):
        if len(self.rows) > 5:
            raise KeyboardInterrupt
        return add(self, completions)

    monkeypatch.setattr(Store, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(organism, CHAINS, sampling=WARM, samples=3, batch_size=3, store=killed)
    monkeypatch.setattr(Store, "add", add)
    assert 5 < len(read_completions(killed)) < 3 * len(CHAINS)
    judged = []  # what is there already is neither judged nor counted again
    generate(
        organism, CHAINS, sampling=WARM, samples=3, batch_size=3, store=killed, judge=lambda c: judged.append(c) is None
    )
    assert len(judged) == len(set(judged)) < 3 * len(CHAINS)
    assert killed.read_bytes() == whole.read_bytes()


def test_a_store_that_was_cut_off_within_a_line_is_resumed_and_stays_readable(organism, tmp_path):
    store = tmp_path / "completions.jsonl"
    whole = generate(organism, CHAINS[:4], sampling=WARM, store=store)
    text = store.read_text()
    store.write_text(text[: len(text) - 30])
    assert len(read_completions(store)) == 3
    assert generate(organism, CHAINS[:4], sampling=WARM, store=store) == whole
    assert sorted(read_completions(store), key=lambda c: c.id) == whole


@pytest.mark.parametrize("span", [None, ThinkingSpan(2, 2, 5, True)])
def test_a_completion_comes_back_from_json_as_it_was(span, tmp_path):
    words = "a \u2028 line,\n \x1c \x85 <b>é</b>"
    made = Completion("7", 1, words, span and words, words, (1, 7), (3, 8, 4), span, "eos", WARM, "organism")
    assert Completion.from_line(made.to_line()) == made
    for _ in range(2):
        write_completions(tmp_path / "c.jsonl", [made])
    assert read_completions(tmp_path / "c.jsonl") == [made, made]
    assert "<b>" not in made._repr_html_()


def test_an_unknown_or_missing_key_of_a_stored_completion_is_refused():
    line = Completion("7", 0, "a", None, "b", (1,), (8,), None, "eos", GREEDY, "organism").to_line()
    with pytest.raises(ValueError, match="A completion has unknown keys: trace. Known: id, sample, prompt"):
        Completion.from_line(line.replace('"answer"', '"trace": 1, "answer"'))
    with pytest.raises(ValueError, match="A completion lacks keys: answer."):
        Completion.from_line(line.replace('"answer": "b", ', ""))


def test_ids_that_do_not_match_the_prompts_are_refused(organism):
    with pytest.raises(ValueError, match="2 prompts came with 1 ids."):
        generate(organism, CHAINS[:2], ids=["p0"])


def test_a_model_without_delimiters_never_thinks():
    plain = build_tokenizer(("<pad>", "<bos>", "<eos>", "?"), "<bos> {{ messages[0]['content'] }} ?")
    (done,) = generate(load(build("llama"), tokenizer=plain), ["w7"], sampling=GREEDY)
    assert (done.thinking, done.span, done.thinking_tokens) == (None, None, 0)
    assert done.answer == plain.decode(done.ids, skip_special_tokens=True).strip()


def test_nothing_asked_nothing_made(organism):
    assert generate(organism, []) == []


def test_a_store_of_another_run_is_refused(organism, tmp_path):
    store = tmp_path / "c.jsonl"
    generate(organism, CHAINS[:2], sampling=GREEDY, store=store)
    with pytest.raises(ValueError, match="c.jsonl was sampled as .*temperature=0.* not as .*temperature=0.7"):
        generate(organism, CHAINS[:2], sampling=WARM, store=store)
    with pytest.raises(ValueError, match="c.jsonl holds another prompt under the id '0'"):
        generate(organism, CHAINS[1:3], sampling=GREEDY, store=store)


def test_one_id_names_one_prompt(organism):
    with pytest.raises(ValueError, match="The id 'x' names more than one prompt"):
        generate(organism, CHAINS[:2], ids=["x", "x"], sampling=GREEDY)


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(organism, tmp_path, kept):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run = partial(generate, organism, CHAINS[:6], sampling=WARM, batch_size=2)
    run(store=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[::-1][:kept]) + lines[0][:17])
    run(store=cut)
    assert cut.read_bytes() == whole.read_bytes()
