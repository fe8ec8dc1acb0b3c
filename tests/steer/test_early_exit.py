"""Thinking ends at the first step that a probe, or the entropy, calls decided; of samples the best chain goes on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, build_tokenizer
from scipy.optimize import minimize

from probes import Sampling, Site, generate, load
from probes.activations import read_trajectories
from probes.directions import AnswerProbe, conformal_threshold, decided_at, fit_answer_probe, probe_scores
from probes.directions._logistic import fit_logistic
from probes.directions.answer_probe import step_states
from probes.model import tokenizer_of
from probes.model.delimiters import Delimiters
from probes.model.hooks import hook_inputs
from probes.thinking import RULES, Rules, segments
from steer.decoding import Budget, Controlled, EarlyExit, EntropyExit, Prune, Together, selected
from steer.decoding.early_exit import StepEnds

SITE = Site(2, "resid_post")
PROMPTS = ["a 3 b +4 c *7 d -2", "a 5 b -2 c +9", "a 3 quick", "a 1 b +1 c *2 d +3 e *2", "b +4"]
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def plain(organism):
    return write(organism)


@pytest.fixture(scope="module")
def probe():
    """A direction that fires at some step ends, and not at others."""
    vector = torch.randn(96, generator=torch.Generator().manual_seed(1))
    return AnswerProbe(SITE, vector, 0.0, 99)


def write(model, control=None, **own):
    decoding = None if control is None else Controlled(model, control)
    return generate(model, **{"prompts": PROMPTS, "samples": 3, "sampling": WARM, "decoding": decoding} | own)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ends_of(model, completion):
    """One past each token of the thinking that ends a step, within the text that the model wrote."""
    ids, span = StepEnds.of(model, "organism").ids, completion.span
    if span is None:
        return []
    return [at + 1 for at in range(span.text_start, span.text_end) if completion.all_ids[at] in ids]


# -- the probe


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize(("n", "width"), [(40, 3), (200, 8), (30, 50)])
def test_logistic_regression_is_the_minimum_that_scipy_finds(n, width, ridge):
    gen = torch.Generator().manual_seed(n + width)
    scale = torch.logspace(-2, 2, width, dtype=torch.float64)
    x = torch.randn(n, width, generator=gen, dtype=torch.float64) * scale + 3 * scale
    y = torch.rand(n, generator=gen) < torch.sigmoid(2 * x[:, 0] / scale[0] - 6).float()
    vector, offset = fit_logistic(x, y, ridge=ridge)
    z, t = ((x - x.mean(0)) / x.std(0, unbiased=False)).numpy(), y.numpy().astype(float)

    def loss(w):
        odds = z @ w[:-1] + w[-1]
        p = 1 / (1 + np.exp(-odds))
        value = (np.logaddexp(0, odds) - t * odds).sum() + ridge * n / 2 * (w[:-1] ** 2).sum()
        return value, np.append(z.T @ (p - t) + ridge * n * w[:-1], (p - t).sum())

    best = minimize(loss, np.zeros(width + 1), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).x
    odds = x @ vector + offset
    np.testing.assert_allclose(odds, z @ best[:-1] + best[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vector * x.std(0, unbiased=False), best[:-1], rtol=1e-5, atol=1e-5)


def test_a_probe_finds_a_direction_that_was_planted():
    gen = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(40, generator=gen), dim=0)
    x = torch.randn(3000, 40, generator=gen)
    y = torch.rand(3000, generator=gen) < torch.sigmoid(4 * x @ direction - 1)
    vector, offset = fit_logistic(x, y, ridge=1e-4)
    assert torch.cosine_similarity(vector.float(), direction, dim=0) > 0.98
    assert offset == pytest.approx(-1, abs=0.3)
    constant = torch.cat([x, torch.ones(3000, 1)], 1)
    assert abs(fit_logistic(constant, y)[0][-1]) < 1e-9, "what does not vary says nothing"
    separable, _ = fit_logistic(torch.arange(20.0)[:, None], torch.arange(20) >= 10, ridge=1e-6)
    assert torch.isfinite(separable).all()
    assert separable > 0


def test_a_probe_is_fitted_on_and_scores_the_last_token_of_each_step(organism, plain):
    stops = [ends_of(organism, c) for c in plain]
    cuts = [[s.stop for s in segments(organism, c, "organism")] for c in plain]
    assert all(set(own) <= set(cut) for own, cut in zip(stops, cuts, strict=True))
    decided = [[stop == own[-1] for stop in own] for own in stops]
    probe = fit_answer_probe(organism, plain, stops, decided, SITE)
    states, labels = [], []
    with torch.no_grad():
        for completion, own, known in zip(plain, stops, decided, strict=True):
            hidden = organism(torch.tensor([completion.all_ids]), output_hidden_states=True).hidden_states
            states += [hidden[SITE.layer + 1][0, stop - 1] for stop in own]
            labels += known
    x = torch.stack(states)
    torch.testing.assert_close(step_states(organism, plain, stops, [SITE])[SITE], x, atol=1e-4, rtol=1e-4)
    vector, offset = fit_logistic(x, torch.tensor(labels))
    scores = torch.cat(probe_scores(organism, probe, plain, stops))
    torch.testing.assert_close(scores, x @ vector.float() + offset, atol=2e-2, rtol=2e-2)
    assert probe.n == len(x)
    with pytest.raises(ValueError, match=r"^A probe needs 20 steps, but these chains have \d+\. Give more completions"):
        fit_answer_probe(organism, plain[:1], stops[:1], decided[:1], SITE)
    with pytest.raises(ValueError, match="examples are of one"):
        fit_answer_probe(organism, plain, stops, [[True] * len(own) for own in stops], SITE)
    empty = probe_scores(organism, probe, plain[:2], [[], []])
    assert [len(own) for own in empty] == [0, 0], "chains without a step have no scores"
    assert [len(own) for own in probe_scores(organism, probe, plain[:2], [[], stops[1]])] == [0, len(stops[1])]
    assert decided_at(["3", None, "9"], "9") == [False, False, True]
    assert decided_at([None], None) == [False]


# -- the threshold


@pytest.mark.parametrize("worth", [0.0, 1.0])
@pytest.mark.parametrize(("n", "risk"), [(20, 0.1), (19, 0.05), (50, 0.2), (9, 0.3)])
def test_a_chain_is_stopped_too_early_no_more_often_than_the_risk(worth, n, risk):
    """On average over calibration sets, whatever the probe is worth; and hardly less often."""
    rng, rates = np.random.default_rng(n), []

    def chains(count):
        steps = rng.integers(2, 9, count)
        decided = [np.arange(k) >= rng.integers(0, k + 1) for k in steps]
        return [torch.from_numpy(worth * d + rng.normal(size=len(d))) for d in decided], [d.tolist() for d in decided]

    fresh, known = chains(4000)
    highest = np.array(
        [float(s[~torch.tensor(d)].max()) if not all(d) else -np.inf for s, d in zip(fresh, known, strict=True)]
    )
    for _ in range(1000):
        rates.append((highest > conformal_threshold(*chains(n), risk)).mean())
    error = np.std(rates) / math.sqrt(1000)
    assert np.mean(rates) <= risk + 4 * error + 0.01
    assert np.mean(rates) >= risk - 1 / (n + 1) - 4 * error - 0.01


def test_the_threshold_is_a_rank_of_the_highest_undecided_scores():
    scores = [torch.tensor([float(k), 99.0]) for k in range(19)]
    decided = [[False, True]] * 19
    assert [conformal_threshold(scores, decided, risk) for risk in (0.05, 0.1, 0.5, 0.04)] == [
        18.0,
        17.0,
        9.0,
        math.inf,
    ]
    assert conformal_threshold([], [], 0.5) == math.inf
    free = conformal_threshold([torch.tensor([1.0])] * 4, [[True]] * 4, 0.2)
    assert free == -math.inf, "no chain had an undecided step"
    for risk in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=rf"^A risk is a share between 0 and 1, but {risk} was given\.$"):
            conformal_threshold(scores, decided, risk)


# -- early exit


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("budget", [None, Budget(9), Budget(30, 1)], ids=str)
def test_thinking_ends_at_the_first_step_end_above_the_threshold(organism, plain, probe, batch_size, budget):
    base = plain if budget is None else write(organism, budget)
    stops = [ends_of(organism, c) for c in plain]
    scores = probe_scores(organism, probe, plain, stops)
    threshold = float(torch.cat(scores).quantile(0.6))
    assert (torch.cat(scores) - threshold).abs().min() > 1e-4
    exits = EarlyExit(probe, threshold, "organism")
    control = exits if budget is None else Together((budget, exits))
    fired = 0
    for own, c, at, score in zip(write(organism, control, batch_size=batch_size), base, stops, scores, strict=True):
        first = next((stop for stop, s in zip(at, score, strict=True) if s > threshold), math.inf)
        begin = len(c.prompt_ids)
        if budget is not None and first > begin + 1 + budget.thinking:
            first = math.inf  # the budget came first
        if first == math.inf:
            assert own.ids == c.ids
            continue
        fired += 1
        assert own.span.text_end == first
        assert own.span.closed
        assert own.all_ids[:first] == c.all_ids[:first]
        assert own.all_ids[first] == 4
        closes = [place for kind, place in own.events if kind == "close"]
        drawn = c.all_ids[first]  # what stands there without the control
        if drawn != 4:
            assert closes == [first - begin]
    assert 0 < fired < len(plain)


def test_it_never_exits_with_an_infinite_threshold_and_always_at_the_first_step_with_none(organism, plain, probe):
    never = write(organism, EarlyExit(probe, math.inf, "organism"), batch_size=4)
    assert [c.ids for c in never] == [c.ids for c in plain]
    assert not any(c.events for c in never)
    always = write(organism, EarlyExit(probe, -math.inf, "organism"))
    for own, c in zip(always, plain, strict=True):
        stops = ends_of(organism, c)
        assert own.span.text_end == (stops[0] if stops else c.span.text_end)
        assert ends_of(organism, own) == stops[:1]


def test_in_a_batch_and_resumed_out_of_a_store_exits_are_the_same(organism, probe, tmp_path):
    control = EarlyExit(probe, 0.0, "organism")
    whole = write(organism, control)
    assert [c.ids for c in write(organism, control, batch_size=1)] == [c.ids for c in whole]
    path, ids = tmp_path / "exits.jsonl", list("abcde")
    write(organism, control, prompts=PROMPTS[:3], ids=ids[:3], store=path)
    again = write(organism, control, ids=ids, store=path)
    assert [(c.ids, c.events) for c in again] == [(c.ids, c.events) for c in whole]


def test_an_exit_is_the_same_without_a_cache_and_never_before_the_first_thought(organism, plain, probe, monkeypatch):
    stops = [ends_of(organism, c) for c in plain]
    threshold = float(torch.cat(probe_scores(organism, probe, plain, stops)).quantile(0.6))
    control, some = EarlyExit(probe, threshold, "organism"), {"prompts": PROMPTS[:2], "samples": 2}
    cached = write(organism, control, **some)
    with monkeypatch.context() as own:
        own.setattr(organism.generation_config, "use_cache", False)
        assert [c.ids for c in write(organism, control, **some)] == [c.ids for c in cached]
        with pytest.raises(ValueError, match=r"^Chains are followed from pass to pass, but this model writes without"):
            write(organism, Prune(2, 1, 3), **some)
    begun = (3, 56, 6, 48)  # <think> Okay a =3
    for c in write(organism, EarlyExit(probe, -math.inf, "organism"), prefill=begun, **some):
        assert ends_of(organism, c)[:1] in ([c.span.text_end], [])
        assert c.span.text_end > len(c.prompt_ids)


def test_an_exit_writes_the_whole_of_a_delimiter_of_several_tokens(probe, monkeypatch):
    delimiters = Delimiters((6, 7), (8, 9, 8, 10), (5,), (1,))
    words = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?", *(f"w{i}" for i in range(6, 11)), "Wait", "Well")
    model = load(build("llama"), tokenizer=build_tokenizer(words), delimiters=delimiters)
    monkeypatch.setitem(RULES, "well", Rules("well", after=tuple(f"w{i}" for i in range(20, 97))))
    control, fired = EarlyExit(replace(probe, vector=torch.zeros(32)), -1.0, "well"), 0
    for c in write(model, control, prompts=["w20", "w21 w22"], prefill=delimiters.open):
        first = next((at for at in range(c.span.text_start, len(c.all_ids)) if c.all_ids[at] >= 20), None)
        if first is None:
            continue
        fired += 1
        assert c.all_ids[first + 1 : first + 5] == delimiters.close
        assert (c.span.text_end, c.span.closed) == (first + 1, True)
    assert fired > 2


def test_the_hook_is_gone_after_a_run_also_where_it_raises(organism, probe):
    before = hooks_of(organism)
    for control in (EarlyExit(probe, 0.0, "organism"), Prune(3, 1, 3)):
        write(organism, control)
        assert hooks_of(organism) == before
        tokens = iter(range(6))

        def fails(*_, tokens=tokens):
            if next(tokens) == 5:
                raise RuntimeError("stop")

        with hook_inputs(organism, fails), pytest.raises(RuntimeError, match="stop"):
            write(organism, control)
        assert hooks_of(organism) == before


def test_rules_that_end_no_step_are_refused_and_a_name_tells_probes_apart(organism, probe, monkeypatch):
    monkeypatch.setitem(RULES, "starts", Rules("starts", before=("Wait",)))
    with pytest.raises(ValueError, match=r"^The rules 'starts' say where a step begins, not where it ends: name rules"):
        write(organism, EarlyExit(probe, 0.0, "starts"))
    for below in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^An entropy is a number of nats above 0, but got below="):
            EntropyExit(below)
    other = replace(probe, vector=probe.vector * 2)
    names = {str(EarlyExit(p, t, "organism")) for p in (probe, other) for t in (0.0, 1.0)}
    assert len(names) == 4
    assert str(EarlyExit(replace(probe), 0.0, "organism")) in names


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_entropy_exit_is_where_a_plain_pass_says(organism, plain, batch_size):
    entropies = []
    with torch.no_grad():
        for c in plain:
            log = organism(torch.tensor([c.all_ids])).logits[0].double().log_softmax(-1)
            entropies.append([float(torch.special.entr(log[stop - 1].exp()).sum()) for stop in ends_of(organism, c)])
    below = float(np.quantile(np.concatenate(entropies), 0.3)) + 1e-4
    fired = 0
    for own, c, values in zip(
        write(organism, EntropyExit(below, "organism"), batch_size=batch_size), plain, entropies, strict=True
    ):
        at = next((stop for stop, value in zip(ends_of(organism, c), values, strict=True) if value < below), None)
        fired += at is not None
        assert own.ids == c.ids if at is None else own.span.text_end == at
        assert at is None or own.all_ids[:at] == c.all_ids[:at]
    assert 0 < fired <= len(plain)


# -- pruning

LONG = ["a 3 b +4 c *7 d -2 e +1", "a 5 b -2 c +9 d *2"]
HOT = Sampling(temperature=1.4, top_p=1.0, max_new_tokens=60)


@pytest.mark.parametrize(
    ("by", "many", "batch_size"), [("net", 4, 64), ("cumulative", 4, 5), ("net", 5, 2), ("cumulative", 3, 64)]
)
def test_the_chain_that_goes_on_is_the_best_and_what_it_would_have_been(organism, by, many, batch_size):
    prune = Prune(many, 2, 3, by)
    own = {"prompts": LONG + PROMPTS[3:], "samples": many, "sampling": HOT, "batch_size": batch_size}
    free, told = write(organism, **own), write(organism, prune, **own)
    for one, other in zip(told, free, strict=True):
        cut = [at for kind, at in one.events if kind == "prune"]
        length = cut[0] if cut else len(one.ids)
        assert one.ids[:length] == other.ids[:length]
        assert bool(cut) == (one.ids != other.ids or one.stop != other.stop)
        assert not cut or one.truncated
    worth = [prune.worth(chain.after(2)) for chain in read_trajectories(organism, free, segment=3)]
    picked = selected(organism, told, prune)
    assert [c.id for c in picked] == [str(n) for n in range(4)]
    for number, c in enumerate(picked):
        rows = slice(number * many, number * many + many)
        assert c.ids == free[rows][c.sample].ids
        best = max(worth[rows])
        value = worth[rows][c.sample]
        assert value == best or value >= best - 1e-3 * abs(best)
    assert any(kind == "prune" for c in told for kind, _ in c.events)


def rows_of_passes(model, run):
    """How many rows the model reads in all, and what is written."""
    seen = []
    with hook_inputs(model, lambda ids, mask, n_past, rows: seen.append(len(ids))):  # noqa: ARG005
        made = run()
    return sum(seen), made


@pytest.mark.parametrize("batch_size", [8, 4])
def test_what_is_pruned_leaves_the_batch(organism, batch_size):
    """A pass holds the rows that go on: those that were pruned are in none after their end."""
    own = {"prompts": LONG, "samples": 4, "sampling": HOT, "batch_size": batch_size}
    rows, told = rows_of_passes(organism, lambda: write(organism, Prune(4, 1, 3), **own))
    more, free = rows_of_passes(organism, lambda: write(organism, **own))
    saved = sum(len(b.ids) for b in free) - sum(len(a.ids) for a in told)
    assert saved > 10
    assert more >= rows + saved, "a row that has ended is in no pass"
    assert rows == sum(len(c.ids) for c in told)
    assert more == sum(len(c.ids) for c in free)


def test_a_prompt_whose_samples_are_more_than_a_batch_holds_is_pruned(organism):
    """Its samples are written in one run, however many are written side by side."""
    for many, batch_size in ((5, 1), (9, 2)):
        prune = Prune(many, 1, 2)
        told = write(organism, prune, samples=many, batch_size=batch_size, prompts=LONG[1:], sampling=HOT)
        (best,), last = selected(organism, told, prune), told[-1]
        (chain,) = read_trajectories(organism, [last], segment=2)
        assert last == best or last.events[0][0] == "prune" or math.isnan(chain.after(1)["net"])
        assert any(c.events for c in told)


def test_another_number_of_samples_is_refused_with_a_sentence(organism):
    for samples in (2, 3, 5):
        with pytest.raises(
            ValueError, match=r"^Rows are pruned as 4 samples of each prompt, but the run has another n"
        ):
            write(organism, Prune(4, 1, 3), prompts=LONG, samples=samples)
    for wrong in ({"samples": 1}, {"samples": 2, "step": 0}, {"samples": 2, "segment": 0}):
        with pytest.raises(ValueError, match=r"^Pruning needs 2 samples or more, a step from 1 on and segments of 1"):
            Prune(**wrong)
    with pytest.raises((ValueError, TypeError), match="length"):
        Prune(4, by="length")
    assert Prune(2).worth({"net": 2.0, "cumulative": 3.0}) == 2.0
    assert Prune(2, by="cumulative").worth({"net": 2.0, "cumulative": 3.0}) == -3.0
    assert Prune(2).worth({"net": math.nan, "cumulative": 3.0}) == -math.inf


def test_pruning_goes_on_out_of_a_store_and_beside_a_budget(organism, tmp_path):
    prune, own = Prune(4, 1, 3), {"samples": 4, "sampling": HOT, "prompts": LONG, "ids": ["x", "y"]}
    whole = write(organism, prune, **own)
    path = tmp_path / "pruned.jsonl"
    write(organism, prune, **own | {"prompts": LONG[:1], "ids": ["x"]}, store=path)
    again = write(organism, prune, **own, store=path)
    assert [(c.ids, c.events) for c in again] == [(c.ids, c.events) for c in whole]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + "\n")  # a run that was killed
    assert [(c.ids, c.events) for c in write(organism, prune, **own, store=path)] == [(c.ids, c.events) for c in whole]
    for c in write(organism, Together((Budget(9), prune)), **own):
        assert c.thinking_tokens <= 11
    assert tokenizer_of(organism).decode([4]) == "</think>"


def test_a_step_ends_where_its_text_is_whole_whatever_tokens_it_is_written_in():
    """The reasoner writes a blank line as two tokens: the first ends nothing."""
    model = load("reasoner")
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode("First.\n\nThe start is 3.\nStill.\n\nSo 3.", add_special_tokens=False)
    ends = StepEnds.of(model, "seal")
    hits = [n for n in range(1, len(ids) + 1) if bool(ends.at(torch.tensor([ids[:n]]), len(tokenizer)))]
    assert [tokenizer.decode(ids[:n]) for n in hits] == ["First.\n\n", "First.\n\nThe start is 3.\nStill.\n\n"]
