"""What was planted in a chain is found: its first solution, what fails, its markers, how alike its thoughts are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes import Sampling, generate, load
from probes.activations import internal_redundancy
from probes.model import tokenizer_of
from probes.model.delimiters import thinking_span
from probes.model.loading import delimiters_of
from probes.thinking import Redundancy, Segment, chain_redundancy, equations_hold, marker_rates, segments, thought_texts
from steer.decoding import StatedAnswer


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def written(organism):
    return generate(organism, ["a 3 b +4 c *7"], sampling=Sampling(temperature=0))[0]


def planted(organism, written, thinking, answer="9"):
    """A completion that thinks these words."""
    tokenizer = tokenizer_of(organism)
    ids = (3, *tokenizer.encode(thinking, add_special_tokens=False), 4, *tokenizer.encode(answer), 2)
    span = thinking_span(written.prompt_ids, ids, delimiters_of(organism))
    return replace(written, ids=ids, span=span, thinking=thinking, answer=answer)


# The thinking, by the organism's own rules: a result ends a thought, Wait and Hmm begin one. And what each comes to.
CHAINS = [
    ("Okay a =3 b +4 =7 c *7 =9", ["3", "7", "9"], [3, 3, 3]),
    ("Okay a =3 b +4 =7 Wait b +4 =7 c *7 =9 Wait c *7 =9", ["3", "7", "7", "9", "9"], [3, 3, 4, 3, 4]),
    ("a =9 b +4 =3", ["9", "3"], [2, 3]),
    ("Okay", [None], [1]),
]


@pytest.mark.parametrize(("thinking", "results", "lengths"), CHAINS, ids=[chain[0] for chain in CHAINS])
@pytest.mark.parametrize("right", ["9", "7", "5"])
def test_the_first_correct_solution_is_where_it_was_planted(organism, written, thinking, results, lengths, right):
    completion = planted(organism, written, thinking)
    found = segments(organism, completion, "organism")
    assert [s.stop - s.start for s in found] == lengths
    assert " ".join(thought_texts(organism, completion, found)) == thinking

    def states(texts):
        assert texts == thought_texts(organism, completion, found)[: len(texts)], "all thoughts up to the last"
        return texts[-1][-1] if "=" in texts[-1] else None

    failing = [result == "7" for result in results]

    def holds(texts):
        return None if results[len(texts) - 1] is None else not failing[len(texts) - 1]

    chain = chain_redundancy(organism, completion, found, states=states, is_right=right.__eq__, holds=holds)
    assert (chain.tokens, chain.thoughts) == (sum(lengths), len(lengths))
    if right not in results:
        assert (chain.solution, chain.solved) == (None, None)
        assert math.isnan(chain.external)
    else:
        at = results.index(right)
        assert (chain.solution, chain.solved) == (at, sum(lengths[: at + 1]))
        assert chain.external == pytest.approx(sum(lengths[at + 1 :]) / sum(lengths))
    stated = [result for result in results if result is not None]
    if stated:
        assert chain.failed == pytest.approx(sum(failing) / len(stated))
    else:
        assert math.isnan(chain.failed)
    own = chain_redundancy(tokenizer_of(organism), completion, found, states=states, is_right=right.__eq__)
    assert replace(own, failed=0.0) == replace(chain, failed=0.0)
    assert math.isnan(own.failed), "without a check"


def test_a_chain_without_thoughts_has_no_solution(organism, written):
    chain = chain_redundancy(organism, written, (), states=lambda _: "9", is_right="9".__eq__)
    assert (chain.tokens, chain.thoughts, chain.solution, chain.solved) == (0, 0, None, None)
    assert math.isnan(chain.external)
    assert math.isnan(chain.failed)
    assert Redundancy(50, 5, 4, 50, 0.0).external == 0.0


def test_the_verifier_of_the_decoding_controls_finds_the_solution(organism, written):
    completion = planted(organism, written, "Okay a =3 b +4 =7 c *7 =9")
    found = segments(organism, completion, "organism")
    verify = StatedAnswer(r"=(\d)")
    chain = chain_redundancy(organism, completion, found, states=verify, is_right="7".__eq__)
    assert chain.solution == 1


TRUE = [
    "3 + 4 = 7", "3+4=7", "12 - 30 = -18", "-3 + 5 = 2", "5 * -2 = -10", "6 × 7 = 42", "6*7=42.", "10 / 4 = 2.5",
    "9 ÷ 3 = 3", "0.1 + 0.2 = 0.3", "So 30 + 12 = 42. Then 42 - 2 = 40.", "1. 3 + 4 = 7", "- 3 + 4 = 7", "8 - 8 = 0",
    "y = 3 + 4 = 7", "1,200 + 300 = 1,500", "1,000 * 1,000 = 1,000,000", "1.5 * 2 = 3", "10 / 3 = 3.33",
    "2 / 3 = 0.667", "x is 5, so 5 + 1 = 6", "Is it 2 + 2 = 4?", "(2 + 3 = 5)", "5 − 3 = 2",
]  # fmt: skip
FALSE = [
    "3 + 4 = 8", "12 - 30 = 18", "6 × 7 = 43", "10 / 4 = 2", "3 * 4 = 12. 30 + 12 = 43.", "3 + 4 = 7.5", "0 / 5 = 5",
    "30 + 12 = 43. 3 * 4 = 12.", "1,200 + 300 = 1,501", "10 / 3 = 3.4", "3 + 4 = 70", "5 / 0 = 0", "5 − 3 = 3",
]  # fmt: skip
NOTHING = [
    "", "Hmm.", "x + 3 = 7", "7 = 3 + 4", "3 + 4", "3 4 = 7", "a =3", "2x + 3 = 7", "x2 + 3 = 7",
    # Parts of a longer expression are no equations: these are true as they stand, but for the last.
    "1 + 2 + 3 = 6", "10 - 5 + 3 = 8", "2 * 3 + 4 = 10", "10 -3 + 5 = 12", "2^3 + 1 = 9", "1/2 + 1/2 = 1",
    "2 * 3 = 2 + 4", "3 + 4 = 14 / 2", "3 x 4 + 2 = 14", "2 \\times 3 + 4 = 10", "(1 + 2) * 3 = 9", "1 + 2 + 3 = 7",
    "2 * 3 = 2x",
]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "verdict"), [(TRUE, True), (FALSE, False), (NOTHING, None)], ids=["true", "false", "nothing"]
)
def test_equations_are_checked_where_they_are_whole(texts, verdict):
    found = {text: equations_hold([text]) for text in texts}
    assert found == dict.fromkeys(texts, verdict)
    assert equations_hold(["1 + 1 = 3", *texts[:1]]) is verdict, "the last thought alone"


def test_planted_equations_are_told_apart():
    rng = np.random.default_rng(0)
    signs = {"+": np.add, "-": np.subtract, "*": np.multiply, "×": np.multiply, "/": np.divide, "÷": np.divide}
    for _ in range(500):
        sign = str(rng.choice(list(signs)))
        a, b = (int(x) for x in rng.integers(1, 2000, 2))
        if sign in "/÷":
            a *= b
        value = int(signs[sign](a, b))
        text = f"We have {a:,} {sign} {b:,} = {value:,}."
        assert equations_hold([text]) is True, text
        wrong = text.replace(f"= {value:,}", f"= {value + int(rng.integers(1, 50)):,}")
        assert equations_hold([wrong]) is False, wrong


def test_markers_are_counted_as_whole_words_in_small_or_capital_letters(written):
    text = "Wait, wait. WAIT! Waiting awaits no wait-list. hold on; Hold On, hold  on. C++ or c++"
    many = replace(written, thinking=text)
    none = replace(written, thinking=None, span=None)
    for completions, tokens in (([many, none], many.thinking_tokens), ([many, many], 2 * many.thinking_tokens)):
        rates = marker_rates(completions, ["wait", "hold on", "C++", "but"])
        times = len(completions) - (completions[-1] is none)
        assert rates == pytest.approx(
            {"wait": 4000 * times / tokens, "hold on": 2000 * times / tokens, "C++": 2000 * times / tokens, "but": 0}
        )
    assert all(math.isnan(rate) for rate in marker_rates([none], ["wait"]).values())
    two = marker_rates([replace(many, thinking="hold"), replace(many, thinking="on")], ["hold on"])
    assert two["hold on"] == 0, "a marker does not stand in two chains"


def thoughts(n):
    return [Segment(9 + i, 10 + i, "execution") for i in range(n)]


@pytest.mark.parametrize("window", [2, 3, 5, 99])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_internal_redundancy_is_the_mean_cosine_within_the_window(organism, written, window, n):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = internal_redundancy(organism, written, thoughts(n), window=window, embed=lambda c, s: x)  # noqa: ARG005
    rows = x.numpy()
    pairs = [
        rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        for i in range(n) for j in range(max(0, i - window + 1), i)
    ]  # fmt: skip
    assert found == pytest.approx(np.mean(pairs), abs=1e-12)
    assert -1 <= found <= 1


def test_thoughts_that_are_one_are_redundant_and_orthogonal_ones_are_not(organism, written):
    for x, value in ((torch.ones(4, 3), 1.0), (torch.eye(4), 0.0), (torch.tensor([[1.0], [-2.0]]), -1.0)):
        found = internal_redundancy(organism, written, thoughts(len(x)), embed=lambda c, s, x=x: x)  # noqa: ARG005
        assert found == pytest.approx(value)
    assert math.isnan(internal_redundancy(organism, written, thoughts(1)))
    assert math.isnan(internal_redundancy(organism, written, ()))
    with pytest.raises(ValueError, match=r"^A window of 1 thoughts holds nothing to compare: give 2 or more\.$"):
        internal_redundancy(organism, written, thoughts(3), window=1)


@torch.no_grad()
def test_by_default_a_thought_is_its_mean_activation_less_that_of_the_chain(organism, written):
    found = segments(organism, written, "organism")
    states = organism(torch.tensor([written.all_ids]), output_hidden_states=True).hidden_states[1:][1][0].double()
    x = torch.stack([states[s.start : s.stop].mean(0) for s in found])
    x = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    value = internal_redundancy(organism, written, found)
    assert value == pytest.approx(float(torch.stack([x[1] @ x[0], x[2] @ x[0], x[2] @ x[1]]).mean()), abs=1e-5)
    assert internal_redundancy(organism, written, found, window=2) == pytest.approx(
        float((x[1] @ x[0] + x[2] @ x[1]) / 2), abs=1e-5
    )
