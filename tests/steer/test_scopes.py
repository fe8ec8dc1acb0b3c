"""A scope means the same tokens with and without a cache, in any batch, any chunks, and on either side of the pads."""

import random

import pytest
import torch
from families import build
from transformers import LogitsProcessorList

from probes.hooks import attached, watched
from probes.models import load, tokenizer_of
from probes.sites import Site
from probes.tokens import Delimiters, thinking_span
from steer.interventions import Add
from steer.recipes import Recipe, applied
from steer.scopes import SCOPES, Clock

THINK = Delimiters(open=(3,), close=(4,), turn=(5,))
LONG = Delimiters(open=(7, 8), close=(9, 10, 11), turn=(5, 6))
SITE = Site(1, "resid_post")
ROWS = {
    "thinks later": [1, 7, 8, 5],
    "thinks from the prompt on": [1, 9, 5, 3],
    "is switched off": [1, 7, 8, 9, 5, 3, 4],
    "thought in an earlier turn": [1, 7, 5, 3, 8, 4, 9, 2, 1, 10, 5],
    "never thinks": [1, 12, 13, 5],
}
SCRIPT = ({1: 3, 4: 4}, {2: 4}, {}, {3: 3}, {})  # by row: what the model is made to write at which step


@pytest.fixture
def thinker(model):
    return load(model, tokenizer=tokenizer_of(model), delimiters=THINK)


def defined(ids, delimiters):
    """The phases as the docstring of Clock defines them, read aloud."""
    phases, now, header = [], 0, 0
    for end in range(1, len(ids) + 1):
        for phase, wanted in enumerate((delimiters.turn, delimiters.open, delimiters.close)):
            if wanted and tuple(ids[max(0, end - len(wanted)) : end]) == wanted:
                now, header = phase, end if phase == 0 else header
        phases.append(now)
    return [0] * header + phases[header:]


def last_header(ids, delimiters):
    turn = delimiters.turn
    return max((end for end in range(len(ids) + 1) if tuple(ids[:end][-len(turn) :]) == turn), default=0)


def padded(rows, side="left"):
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if side == "left" else one + pad for pad, one in zip(pads, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def follow(clock, ids, mask, ends):
    """The phases that the clock gives when it sees the ids in passes that end at `ends`."""
    passes = []
    for start, end in zip([0, *ends], ends, strict=False):
        clock.advance(ids[:, start:end], mask[:, :end], start)
        passes.append(clock.phase)
    return torch.cat(passes, dim=1)


def recipe(model, scope):
    vector = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return Recipe.of(model, [Add(SITE, vector)], scope=scope)


def logits(model, ids, mask):
    return model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


def scripted(width):
    """The delimiters come where SCRIPT has them; no other token below 6 does, so that no row begins a new turn."""

    def force(input_ids, scores):
        scores = scores.clone()
        scores[:, :6] = -torch.inf
        for row, script in enumerate(SCRIPT):
            if (token := script.get(input_ids.shape[1] - width)) is not None:
                scores[row, token] = torch.inf
        return scores

    return LogitsProcessorList([force])


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_means_the_same_with_and_without_a_cache_and_by_definition(thinker, scope):
    ids, mask = padded(list(ROWS.values()))
    runs, touched = [], []
    for use_cache in (True, False):
        clock, steps = Clock(THINK), []

        def see(new, real, n_past, clock=clock, steps=steps):
            clock.advance(new, real, n_past)
            steps.append(clock.mask(scope)[:, -1])

        with applied(thinker, recipe(thinker, scope)), watched(thinker, see):
            out = thinker.generate(
                ids, attention_mask=mask, max_new_tokens=7, do_sample=False, use_cache=use_cache,
                logits_processor=scripted(ids.shape[1]), output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        runs.append(out)
        touched.append(torch.stack(steps, dim=1))
    cached, whole = runs
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.equal(*touched)

    seen = cached.sequences[:, :-1]
    real = torch.cat([mask, mask.new_ones(len(ids), seen.shape[1] - ids.shape[1])], dim=1)
    phases = torch.full_like(seen, -1)
    for row, keep in enumerate(real.bool()):
        phases[row, keep] = torch.tensor(defined(seen[row, keep].tolist(), THINK))
    chosen = real.bool() if scope == "all" else phases == ("prompt", "thinking", "answer").index(scope)
    assert torch.equal(touched[0], chosen[:, ids.shape[1] - 1 :])
    vector = recipe(thinker, scope).steps[0].intervention.vector
    with attached(thinker, SITE, lambda x: torch.where(chosen[..., None], x + vector, x)):
        expected = logits(thinker, seen, real)[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(whole.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_is_steered_the_same_alone_and_beside_others_padded_left_or_right(thinker):
    rows = [row + [14, 3, 15, 4, 16][:cut] for cut, row in enumerate(ROWS.values(), start=1)]
    for scope in SCOPES:
        with applied(thinker, recipe(thinker, scope)):
            alone = torch.cat([thinker(torch.tensor([row])).logits[0] for row in rows])
            for side in ("left", "right"):
                ids, mask = padded(rows, side)
                together = logits(thinker, ids, mask)[mask.bool()]
                torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "phases"),
    [
        ([1, 7, 5, 8, 9], "ppppp"),  # never thinks
        ([1, 7, 5, 3, 8, 4, 9], "pppttaa"),
        ([1, 7, 5, 3], "pppt"),  # the prompt opens it: thinking from the opening tag on
        ([1, 7, 5, 3, 4, 9], "ppptaa"),  # an empty block closes it
        ([1, 7, 5, 3, 8, 4, 9, 2, 1, 7, 5], "p" * 11),  # an earlier turn is prompt
        ([1, 7, 5, 3, 8, 4, 9, 2, 1, 7, 5, 3, 8, 4], "p" * 11 + "tta"),
    ],
)
def test_the_last_delimiter_of_the_turn_gives_the_phase(ids, phases):
    clock = Clock(THINK)
    clock.advance(torch.tensor([ids]), None, 0)
    assert "".join("pta"[phase] for phase in clock.phase[0].tolist()) == phases
    assert defined(ids, THINK) == clock.phase[0].tolist()


@pytest.mark.parametrize("delimiters", [THINK, LONG], ids=["one token", "several tokens"])
def test_in_any_chunks_a_pass_knows_what_was_said_so_far_and_from_the_last_header_on_chunks_change_nothing(
    delimiters,
):
    rng = random.Random(0)
    pieces = [
        delimiters.turn,
        *[delimiters.open, delimiters.close] * 2,
        *((token,) for token in range(3, 13)),
    ]
    for _ in range(150):
        rows = [[t for piece in rng.choices(pieces, k=rng.randint(1, 14)) for t in piece] for _ in range(3)]
        ids, mask = padded(rows)
        width = ids.shape[1]
        one, steps = [width], list(range(1, width + 1))
        for ends in (one, steps, sorted({*rng.choices(range(1, width + 1), k=3), width})):
            got = follow(Clock(delimiters), ids, mask, ends)
            for row, phases in zip(rows, got.tolist(), strict=True):
                expected = [-1] * (pads := width - len(row))
                for start, end in zip([0, *ends], ends, strict=False):
                    start, end = max(start - pads, 0), max(end - pads, 0)
                    expected += defined(row[:end], delimiters)[start:]
                assert phases == expected, (row, ends)
                whole = defined(row, delimiters)
                since = last_header(row, delimiters)
                assert phases[pads + since :] == whole[since:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_have_no_phase_and_the_phases_partition_the_other_tokens(side):
    ids, mask = padded(list(ROWS.values()), side)
    clock = Clock(THINK)
    clock.advance(ids, mask, 0)
    counts = sum(clock.mask(scope).long() for scope in ("prompt", "thinking", "answer"))
    assert torch.equal(counts, mask)
    assert torch.equal(clock.mask("all"), mask.bool())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_after_the_pads_continues_the_phase_before_them(side):
    rows = list(ROWS.values())
    ids, mask = padded(rows, side)
    ids, mask = (
        torch.cat([ids, ids.new_full((len(rows), 1), 20)], 1),
        torch.cat([mask, mask.new_ones(len(rows), 1)], 1),
    )
    phases = follow(Clock(THINK), ids, mask, [ids.shape[1] - 1, ids.shape[1]])
    assert phases[:, -1].tolist() == [defined([*row, 20], THINK)[-1] for row in rows]


@pytest.mark.parametrize("d", [THINK, LONG], ids=["one token", "several tokens"])
def test_the_clock_thinks_where_the_thinking_span_is(d):
    asked, thought = [1, 20, *d.turn], [*d.open, 21, 22, *d.close, 23]
    opened, earlier = [*asked, *d.open], [*asked, *thought, 2, *asked]
    turns = [(asked, thought), (asked, [24, *thought]), (asked, [*d.open, 21]), (asked, [24, 25])]
    turns += [(opened, [21, *d.close, 23]), (opened, [21, 22]), (earlier, thought), (earlier, [24, 25])]
    for prompt, completion in turns:
        clock = Clock(d)
        clock.advance(torch.tensor([[*prompt, *completion]]), None, 0)
        span = thinking_span(prompt, completion, d)
        inside = [] if span is None else list(range(span.first, span.end - span.closed))
        assert clock.mask("thinking")[0].nonzero().flatten().tolist() == inside


def test_a_cache_that_the_clock_did_not_see_from_its_start_is_refused():
    model = build("llama")
    cache = model(torch.tensor([[1, 7, 8, 5]]), use_cache=True).past_key_values
    sentence = (
        "The cache holds 4 tokens of 1 rows, but the clock saw 0: it cannot follow beam search, assisted decoding, "
        "or a cache that began before the recipe was applied."
    )
    with applied(model, recipe(model, "thinking")), pytest.raises(ValueError, match=sentence):
        model(torch.tensor([[3]]), past_key_values=cache)


def test_beam_search_with_a_cache_is_refused():
    model = build("llama")
    ids = torch.tensor([[1, 7, 8, 5, 3]])
    with (
        applied(model, recipe(model, "thinking")),
        pytest.raises(ValueError, match="cannot follow beam search"),
    ):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, num_beams=2, do_sample=False
        )


def test_inputs_embeds_are_refused():
    model = build("llama")
    embedded = model.get_input_embeddings()(torch.tensor([[1, 7, 5]]))
    sentence = "A scope reads token ids, but the model was called with inputs_embeds."
    with applied(model, recipe(model, "answer")), pytest.raises(ValueError, match=sentence):
        model(inputs_embeds=embedded)


def test_a_clock_that_saw_no_tokens_has_no_mask():
    with pytest.raises(ValueError, match="The clock has seen no tokens yet."):
        Clock(THINK).mask("thinking")
