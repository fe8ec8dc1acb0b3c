"""Each control keeps its law whatever the model writes, in any batch, and its log says what it did."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import build, build_tokenizer
from transformers import LogitsProcessor

from probes.generation._generate import generate
from probes.generation.completions import read_completions
from probes.generation.sampling import Sampling
from probes.model.delimiters import Delimiters, find, thinking_span
from probes.model.loading import delimiters_of, load, tokenizer_of
from probes.model.tokens import encode_prompt
from steer.decoding.budgets import Budget, BudgetForcing, CloseBias
from steer.decoding.control import Controlled, ControlLog, Processors, Together
from steer.decoding.convergence import Converge, StatedAnswer, YesNo, thoughts_of
from steer.decoding.prompts import PromptStyle, ellipsis, empty_thinking, length_tag, step_by_step, thinking_off
from steer.decoding.state import DecodingState
from steer.evaluation._evaluate import evaluate, solve
from steer.tasks.chains import TASKS

CHAINS = TASKS["chains"]
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=60)
EARLIER = [
    {"role": "user", "content": "w20"},
    {"role": "assistant", "content": "<think> w21 </think> w22"},
    {"role": "user", "content": "w23"},
]
PROMPTS = ["w20 w21 w22 w23 w24", "w20", EARLIER, "w25 w26", "w27"]
ONE, MANY = Delimiters((3,), (4,), (5,), (1,)), Delimiters((6, 7), (8, 9, 8, 10), (5,), (1,))


@dataclass(frozen=True)
class Babble:
    """A model that writes any of a few tokens with one chance: whatever a model may write soon comes."""

    tokens: tuple[int, ...]

    def processors(self, model, rows):  # noqa: ARG002
        return Processors(before=(_Babbling(self.tokens),))


class _Babbling(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores):  # noqa: ARG002
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens, 0.0)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def problems():
    return CHAINS.sample(40, "report")


def babbling(delimiters, tokens):
    words = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?", *(f"w{i}" for i in range(6, 11)), "Wait", "Well")
    return load(build("llama"), tokenizer=build_tokenizer(words), delimiters=delimiters), delimiters, tokens


@pytest.fixture(scope="module", params=[ONE, MANY], ids=["one token", "several tokens"])
def babbler(request):
    """A tiny model, its delimiters, and what it babbles: both delimiters' pieces, headers, end, a marker, words."""
    pieces = set(request.param.open + request.param.close)
    return babbling(request.param, (*sorted(pieces), 1, 2, 5, 11, 12, 20, 21))


def babbled(babbler, control, *, samples=10, opened=False, sampling=WARM, batch_size=64):
    """What babbling under a control writes; with `opened`, after prompts that open the thinking."""
    model, delimiters, tokens = babbler
    both = Together((Babble(tokens), control)) if control else Babble(tokens)
    prefill = delimiters.open if opened else ()
    return generate(
        model, PROMPTS, sampling=sampling, samples=samples, prefill=prefill, batch_size=batch_size,
        decoding=Controlled(model, both),
    )  # fmt: skip


def parts(completion, delimiters):
    """Lengths of thought and of solution, both without delimiters, by the span that completions are read by."""
    prompt, ids = completion.prompt_ids, completion.ids
    span = thinking_span(prompt, ids, delimiters)
    if span is None:
        return 0, len(ids)
    begin = max(span.first + 1, len(prompt))
    closes = len(delimiters.close) * span.closed
    return span.end - closes - begin, len(prompt) + len(ids) - span.end


def prefixes_hold(controlled, plain):
    """Until its first event a controlled completion is the plain one, token by token; without one it is the same."""
    for own, other in zip(controlled, plain, strict=True):
        at = own.events[0][1] if own.events else max(len(own.ids), len(other.ids))
        assert own.ids[:at] == other.ids[:at]
        assert own.ids[: at + 1] != other.ids[: at + 1] or not own.events


BUDGETS = [Budget(0, 1), Budget(1, 3), Budget(7, 5), Budget(thinking=4), Budget(solution=2)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("opened", [False, True])
def test_thinking_and_solution_never_exceed_their_budgets_whatever_is_written(babbler, budget, opened):
    _, delimiters, _ = babbler
    told = babbled(babbler, budget, opened=opened)
    for c in told:
        thought, solution = parts(c, delimiters)
        thinks = c.span is not None
        assert budget.thinking is None or thought <= budget.thinking
        if budget.solution is not None:
            assert solution <= budget.solution
        if None not in (budget.thinking, budget.solution):
            assert c.ids[-1] == 2, "the solution completes"
            assert not thinks or c.span.closed
        for kind, at in c.events:
            if kind == "close":
                assert c.span.end - len(c.prompt_ids) <= at + len(delimiters.close), "it closes at once"
    kinds = Counter(kind for c in told for kind, _ in c.events)
    assert (kinds["close"] > 0) == (budget.thinking is not None)
    assert kinds["cut"] == 0 or budget.solution is not None
    assert kinds["cut"] > 0 or budget.solution is None or (opened and budget.thinking is None)
    prefixes_hold(told, babbled(babbler, None, opened=opened))
    assert max(Counter(kind for kind, _ in c.events)["close"] for c in told) <= 1


@pytest.mark.parametrize("budget", [Budget(6, 3), Budget(3, 2), Budget(20, 1)], ids=str)
def test_the_organism_keeps_its_budgets_and_what_is_within_them_stays_as_it_was(organism, problems, budget):
    sampling = Sampling.of(organism, max_new_tokens=64)
    plain, told = (solve(organism, problems, sampling=sampling, samples=2, control=c) for c in (None, budget))
    over = 0
    for own, other in zip(told, plain, strict=True):
        thought, solution = parts(own, ONE)
        assert thought <= budget.thinking
        assert solution <= budget.solution
        assert own.ids[-1] == 2
        long, answered = parts(other, ONE)
        within = long <= budget.thinking and answered <= budget.solution and not other.truncated
        assert within == (not own.events) == (own.ids == other.ids)
        assert own.truncated == any(kind == "cut" for kind, _ in own.events)
        over += long > budget.thinking
    log = ControlLog.of(told)
    assert log.counts()["close"] == over
    for (name, sample), places in log.positions("close").items():
        c = next(c for c in told if (c.id, c.sample) == (name, sample))
        assert [c.ids[at] for at in places] == [4] * len(places)


def always(_):
    return "yes"


LOOSE = Converge(2, verifier=always, markers=("Wait",), every=3)


@pytest.mark.parametrize("control", [Budget(3, 4), BudgetForcing(2, "Wait Well"), CloseBias(-1.0), LOOSE], ids=str)
@pytest.mark.parametrize("opened", [False, True])
def test_batches_change_nothing(babbler, control, opened):
    write = partial(babbled, babbler, control, samples=2, opened=opened, sampling=replace(WARM, max_new_tokens=25))
    whole = write()
    assert whole == write(batch_size=1) == write(batch_size=3)


def test_exactly_n_markers_are_inserted_before_the_model_may_end_its_thinking(babbler):
    """With n the completion is that with n - 1 until it would have ended its thinking; there stands the marker."""
    _, delimiters, tokens = babbler
    runs = [
        babbled(babbler, BudgetForcing(n, "Wait Well"), opened=True, sampling=replace(WARM, max_new_tokens=400))
        for n in range(4)
    ]
    assert [c.ids for c in runs[0]] == [
        c.ids for c in babbled(babbler, None, opened=True, sampling=replace(WARM, max_new_tokens=400))
    ]
    for n, told in enumerate(runs):
        for c in told:
            places = [at for kind, at in c.events if kind == "insert"]
            ended = c.span.closed or c.ids[-1] == 2
            assert len(places) == n if ended else len(places) <= n
            assert all(c.ids[at : at + 2] == (11, 12) for at in places)
        assert sum(c.span.closed or c.ids[-1] == 2 for c in told) >= 0.9 * len(told)
        if n:
            written = [sum(pair == (11, 12) for pair in pairwise(c.ids)) for c in told]
            assert max(written) > n, "the model writes markers of its own"
    for fewer, more in pairwise(runs):
        for short, long in zip(fewer, more, strict=True):
            added = set(long.events) - set(short.events)
            assert set(short.events) <= set(long.events)
            for _, at in added:
                assert short.ids[:at] == long.ids[:at]
                assert short.ids[at] in (delimiters.close[0], 2)


@pytest.mark.parametrize("n", [1, 3])
def test_the_organism_waits_exactly_n_times_more(organism, problems, n):
    sampling = Sampling.of(organism, max_new_tokens=120)
    told = solve(organism, problems, sampling=sampling, samples=2, control=BudgetForcing(n))
    log, wait = ControlLog.of(told), tokenizer_of(organism).encode("Wait")[0]
    ended = [c for c in told if not c.truncated]
    assert len(ended) > 0.8 * len(told)
    for c in ended:
        places = log.positions("insert")[c.id, c.sample]
        assert len(places) == n
        assert {c.ids[at] for at in places} == {wait}
    assert log.counts()["insert"] >= n * len(ended)


def test_after_a_marker_the_model_writes_a_token_of_its_own_that_ends_nothing():
    told = babbled(babbling(ONE, (4, 2, 11)), BudgetForcing(5, "Well"), opened=True, samples=30)
    after = [c.ids[at + 1] for c in told for kind, at in c.events if at + 1 < len(c.ids)]
    assert set(after) == {11}


def test_a_budget_holds_over_markers_and_where_it_ends_a_marker_none_is_counted(babbler):
    _, delimiters, _ = babbler
    told = babbled(babbler, Together((Budget(9, 4), BudgetForcing(50, "Wait Well Wait Well"))), opened=True)
    assert all(parts(c, delimiters)[0] <= 9 and c.ids[-1] == 2 for c in told)
    for c in told:
        places = [at for kind, at in c.events if kind == "insert"]
        assert all(c.ids[at : at + 4] == (11, 12, 11, 12) for at in places)
        assert len(places) <= 2
    assert any(
        c.ids[i : i + 2] == (11, 12) and not any(k == "insert" for k, _ in c.events) for c in told for i in range(9)
    )


@pytest.mark.parametrize("delimiters", [ONE, MANY], ids=["one token", "several tokens"])
def test_a_bias_moves_the_one_logit_that_begins_to_close_and_only_while_thinking(delimiters):
    """Rows: thinking, in the midst of closing or not; not opened; closed; ended; past the bias's last token."""
    nearly = delimiters.close[:-1]
    model = load(build("llama"), delimiters=delimiters)
    thoughts = [(20, 21, 22, *nearly), (20, 21, *nearly, 22), (*nearly,), (*delimiters.close, *nearly), (2, *nearly)]
    for i, (written, opened) in enumerate(zip(thoughts, (True, True, False, True, True), strict=True)):
        prompt = [1, 20, 5, *(delimiters.open if opened else ())]
        for until in (None, len(written), len(written) + 1):
            rows = DecodingState(delimiters, [2], torch.ones(1, len(prompt), dtype=torch.long))
            (biased,) = CloseBias(-1.5, until).processors(model, rows).before
            for step in range(len(written) + 1):
                ids = torch.tensor([[*prompt, *written[:step]]])
                rows.follow(ids)
                scores = torch.randn(1, 97, generator=torch.Generator().manual_seed(i))
                change = biased(ids, scores) - scores
            touched = i == 1 or (i == 0 and not nearly)
            expected = torch.zeros(1, 97)
            expected[0, delimiters.close[0]] = -1.5 * (touched and until != len(written))
            torch.testing.assert_close(change, expected)


def test_a_penalty_lengthens_a_bonus_shortens_and_the_bounds_are_never_and_at_once(organism, problems):
    sampling = Sampling.of(organism, max_new_tokens=40)
    strengths = (-np.inf, -3.0, 0.0, 3.0, 100.0)
    runs = {s: solve(organism, problems, sampling=sampling, control=CloseBias(s)) for s in strengths}
    lengths = [np.mean([c.thinking_tokens for c in runs[s]]) for s in strengths]
    assert all(a > b for a, b in pairwise(lengths))
    assert not any(4 in c.ids for c in runs[-np.inf])
    assert {c.thinking for c in runs[100.0]} == {""}
    assert [c.ids for c in runs[0.0]] == [c.ids for c in solve(organism, problems, sampling=sampling)]
    first = solve(organism, problems, sampling=sampling, control=CloseBias(-np.inf, until=8))
    assert min(parts(c, ONE)[0] for c in first if not c.truncated) >= 8


def stops_at(ids, m, every, results, markers):
    """Where the thinking of a plain completion is stopped: by hand, from the words of the organism."""
    start = ids.index(3) + 1
    end = ids.index(4, start) if 4 in ids[start:] else len(ids)
    for step in range(every, end + 1, every):
        thoughts, answers = [[]], []
        for i, token in enumerate(ids[start:step]):
            if token in markers and start + i < step - 1 and thoughts[-1]:
                thoughts.append([])
            thoughts[-1].append(token)
        for thought in thoughts[:-1]:
            answers += [results[t] for t in reversed(thought) if t in results][:1]
        if any(len(set(answers[i : i + m])) == 1 for i in range(len(answers) - m + 1)):
            return step
    return None


@pytest.mark.parametrize(("m", "every"), [(1, 1), (2, 1), (3, 1), (2, 7)])
def test_equal_answers_stop_the_thinking_at_once_and_unequal_ones_never(organism, m, every):
    tokenizer = tokenizer_of(organism)
    results = {tokenizer.encode(f"={k}")[0]: k for k in (3, 4)}
    wait, hmm = (tokenizer.encode(word)[0] for word in ("Wait", "Hmm"))
    alphabet = (3, wait, hmm, tokenizer.encode("a")[0], *results, *((4,) if every == 7 else ()))
    warm = replace(WARM, max_new_tokens=45)
    write = partial(generate, organism, ["a 3 b +4", "a 5 b *7 c +1"], sampling=warm, samples=30)
    plain = write(decoding=Controlled(organism, Babble(alphabet)))
    told = write(decoding=Controlled(organism, Together((Babble(alphabet), Converge(m, every=every)))))
    stopped = 0
    for own, other in zip(told, plain, strict=True):
        at = None if 3 not in other.ids else stops_at(other.ids, m, every, results, (wait, hmm))
        assert [place for kind, place in own.events if kind == "close"] == (
            [] if at is None or other.ids[at : at + 1] in ((4,), ()) else [at]
        )
        if at is not None and at < len(own.ids):
            assert own.ids[: at + 1] == (*other.ids[:at], 4)
            stopped += 1
        else:
            assert own.ids == other.ids
    assert 0 < stopped < len(told)


def test_a_guide_is_written_before_the_thinking_is_closed(babbler):
    model, delimiters, tokens = babbler
    told = babbled(
        babbler, Converge(1, verifier=always, markers=("Wait",), guide="Well Well w20", every=1), opened=True
    )
    guided = [(c, at) for c in told for kind, at in c.events if kind == "guide"]
    assert guided
    for c, at in guided:
        if len(c.ids) >= at + 3 + len(delimiters.close):
            assert c.ids[at : at + 3] == (12, 12, 20)
            assert c.span.end - len(c.prompt_ids) <= at + 3 + len(delimiters.close)


def test_thoughts_begin_at_markers_and_a_marker_that_may_go_on_is_none_yet():
    told = "One. Wait, two.\n\nButter. But three Wait"
    assert thoughts_of(told, ("Wait", "But")) == ["One. ", "Wait, two.\n\nButter. ", "But three Wait"]
    assert thoughts_of(told + " a", ("Wait",)) == ["One. ", "Wait, two.\n\nButter. But three ", "Wait a"]
    assert thoughts_of(told, ("\n\n",)) == ["One. Wait, two.", "\n\nButter. But three Wait"]


@pytest.mark.parametrize(
    ("said", "answer"),
    [("3 + 4 = 7, so 7 * 2 = 14.", "14"), ("It is -1,200.", "-1,200"), (r"\boxed{3/4} then", "3/4"), ("7 or 8", None)],
)
def test_a_rule_reads_the_last_result_of_the_last_thought(said, answer):
    assert StatedAnswer()(["= 99", said]) == answer


def test_a_judge_says_yes_with_its_probability_and_equal_thoughts_have_one_name(monkeypatch):
    words = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?", "yes", "No", "no")
    judge = load(build("qwen3"), tokenizer=build_tokenizer(words))
    verifier = YesNo(judge, "tiny", states="w20 {thought}", agrees="w21 {first} {second}")
    ids = encode_prompt(tokenizer_of(judge), "w20 w30")
    with torch.no_grad():
        p = judge(torch.tensor([ids])).logits[0, -1].double().softmax(0)
    assert verifier.probability("w20 w30") == pytest.approx(float(p[6] / (p[6] + p[7] + p[8])), abs=1e-5)
    with pytest.raises(ValueError, match="has no token for 'yes': name another judge."):
        YesNo(build("llama"), "mute").probability("w20")

    def planted(_, question):
        told = question.split()[1:]
        return float("=" in question) if len(told) == 1 else float(told[0][-1] == told[1][-1])

    monkeypatch.setattr(YesNo, "probability", planted)
    thoughts = ["a=3", "hm", "b=3", "c=4", "d=4", "so"]
    assert [verifier(thoughts[: i + 1]) for i in range(6)] == ["a=3", None, "a=3", "c=4", "c=4", None]


def test_a_store_belongs_to_one_control_and_a_resumed_run_has_its_whole_log(organism, problems, tmp_path):
    sampling = Sampling.of(organism, max_new_tokens=40)
    run = partial(solve, organism, problems[:9], sampling=sampling, batch_size=4)
    stores = {control: tmp_path / f"{i}.jsonl" for i, control in enumerate((None, Budget(4, 3), Budget(5, 3)))}
    whole = {control: run(control=control, store=store) for control, store in stores.items()}
    assert "decoding" not in stores[None].read_text()
    for control, store in stores.items():
        assert read_completions(store) == whole[control]
        for other in stores:
            if other != control:
                here, there = (f"under {c}" if c else "with no control" for c in (control, other))
                sentence = f"{store} was written {here}, not {there}. Name another file."
                with pytest.raises(ValueError, match=re.escape(sentence)):
                    run(control=other, store=store)
    store, control = stores[Budget(4, 3)], Budget(4, 3)
    lines = store.read_bytes()
    store.write_bytes(b"".join(lines.splitlines(keepends=True)[:5]))
    again = run(control=control, store=store)
    assert store.read_bytes() == lines
    assert ControlLog.of(again) == ControlLog.of(whole[control])
    assert ControlLog.of(again).table().rows[0][0] == "close"
    with pytest.raises(ValueError, match="of completions under one control, but these were written under no control."):
        ControlLog.of(whole[None])


def test_where_the_prompt_closed_the_thinking_all_is_solution(organism, problems):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20)
    told = solve(organism, problems, sampling=sampling, control=Budget(0, 2), style=empty_thinking())
    assert {c.thinking for c in told} == {None}
    assert max(len(c.ids) for c in told) == 2
    assert set(ControlLog.of(told).counts()) <= {"cut"}


def test_names_of_controls_tell_them_apart():
    told = [Budget(1, 2), Budget(2, 1), BudgetForcing(1), BudgetForcing(1, "Hmm"), CloseBias(1.0), Converge(2),
            Converge(3),
            Converge(2, verifier=always), Together((Budget(1, 2), BudgetForcing(1)))]  # fmt: skip
    assert len(set(map(str, told))) == len(told)
    assert " at 0x" not in "".join(map(str, told))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda _: Budget(), "A budget limits the thinking, the solution or both, but got neither."),
        (lambda _: Budget(3, 0), "at least 0 thinking tokens and 1 solution token, but got 3 and 0."),
        (lambda _: BudgetForcing(-1), "inserted 0 times or more, but got n=-1."),
        (lambda _: CloseBias(float("nan")), "a number below infinity, over 0 tokens or more, but got strength=nan"),
        (lambda _: Converge(0), "but got m=0, every=50."),
        (lambda m: Controlled(m, BudgetForcing(1, "perhaps")), "cannot write the marker 'perhaps'. Name another."),
        (lambda m: Controlled(m, BudgetForcing(1, "Wait </think>")), "'Wait </think>' would itself end the thinking."),
        (lambda m: Controlled(m, BudgetForcing(1, "<eos>")), "'<eos>' would itself end the thinking."),
        (lambda m: Controlled(m, Converge(guide="perhaps")), "cannot write the guide 'perhaps'."),
    ],
)
def test_what_cannot_be_is_refused(organism, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(organism).begin(torch.ones(1, 3, dtype=torch.long))


def test_prompt_arms_are_words_around_a_question_and_tokens_before_a_turn():
    model = build("llama")
    ids = partial(encode_prompt, tokenizer_of(model))
    assert delimiters_of(model) == ONE
    assert step_by_step().question("q") == "q Think step by step."
    assert length_tag(512).question("q") == "q Think for 512 tokens."
    assert PromptStyle(before="w20 ").question("w21") == "w20 w21"
    assert ellipsis("w20").prefill(model) == (3, 20)
    assert ellipsis("w20").prefill(load(build("llama"), delimiters=MANY)) == (6, 7, 20)
    assert empty_thinking().prefill(model) == (3, 4)
    assert PromptStyle().prefill(model) == length_tag(3).prefill(model) == ()
    assert PromptStyle(template={"open_thinking": True}, thought="w20", closed=True).prefill(model) == (20, 4)
    with pytest.raises(ValueError, match="cannot write the thought 'Okay'"):
        ellipsis("Okay").prefill(model)
    for ask in (empty_thinking(), thinking_off()):
        (told,) = generate(model, ["w20"], sampling=WARM, template=ask.template, prefill=ask.prefill(model))
        assert told.prompt_ids == (*ids("w20"), 3, 4)
        assert (told.thinking, told.thinking_tokens) == (None, 0)
    assert find(ids("w20"), (3,)) is None


def test_controls_and_prompts_are_arms_beside_the_others(organism, problems):
    sampling = Sampling.of(organism, max_new_tokens=CHAINS.max_new_tokens)
    arms = {"budget": Budget(4, 3), "same": CloseBias(0.0), "none": empty_thinking(), "asked": PromptStyle()}
    found = evaluate(organism, CHAINS, problems, arms, sampling=sampling).arms
    assert found["budget"].length.max() == 6
    assert found["none"].length.max() == 0
    for name in ("same", "asked"):
        assert np.array_equal(found[name].length, found["plain"].length)
        assert np.array_equal(found[name].correct, found["plain"].correct)
