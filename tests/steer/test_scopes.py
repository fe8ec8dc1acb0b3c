"""A scope means the same tokens with or without a cache, in any batch and any chunks, beside any pads."""

import random
from dataclasses import FrozenInstanceError

import pytest
import torch
from families import build
from transformers import LogitsProcessorList

from probes.model.delimiters import Delimiters, thinking_span
from probes.model.hooks import attached, hook_inputs
from probes.model.loading import load, tokenizer_of
from probes.model.sites import Site
from probes.thinking.phases import Clock
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe
from steer.recipes.scope import SCOPES
from steer.runtime._applied import applied

THINK = Delimiters(open=(3,), close=(4,), turn=(5,))
PHASES = ("prompt", "thinking", "answer")
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
    """The phases as the docstring of Clock defines them, read aloud, and the end of the last header."""
    phases, now, header = [], 0, 0
    for end in range(1, len(ids) + 1):
        for phase, wanted in enumerate((delimiters.turn, delimiters.open, delimiters.close)):
            if wanted and tuple(ids[max(0, end - len(wanted)) : end]) == wanted:
                now, header = phase, end if phase == 0 else header
        phases.append(now)
    return [0] * header + phases[header:], header


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
        passes.append(clock.advance(ids[:, start:end], mask[:, :end], start).phase)
    return torch.cat(passes, dim=1)


def recipe(model, scope):
    vector = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return Recipe.of(model, [Add(SITE, vector)], scope=scope)


def logits(model, ids, mask):
    return model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


def scripted(width):
    """Delimiters come where SCRIPT has them, and no other token below 6: no row begins a new turn."""

    def force(input_ids, scores):
        scores = scores.clone()
        scores[:, :6] = -torch.inf
        for row, script in enumerate(SCRIPT):
            if (token := script.get(input_ids.shape[1] - width)) is not None:
                scores[row, token] = torch.inf
        return scores

    return LogitsProcessorList([force])


def run(model, scope, use_cache):
    """What the model writes under a scoped recipe, and if the last token of each step was in the scope."""
    ids, mask = padded(list(ROWS.values()))
    clock, steps = Clock(THINK), []

    def see(new, real, n_past, _rows):
        steps.append(clock.advance(new, real, n_past).mask(scope)[:, -1])

    with applied(model, recipe(model, scope)), hook_inputs(model, see):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=7, do_sample=False, use_cache=use_cache,
            logits_processor=scripted(ids.shape[1]), output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1), torch.stack(steps, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_means_the_same_with_and_without_a_cache_and_by_definition(thinker, scope):
    cached, whole = (run(thinker, scope, use_cache) for use_cache in (True, False))
    assert torch.equal(cached[0], whole[0])
    assert torch.equal(cached[2], whole[2])

    mask = padded(list(ROWS.values()))[1]
    seen, width = cached[0][:, :-1], mask.shape[1]
    real = torch.cat([mask, mask.new_ones(len(mask), seen.shape[1] - width)], dim=1)
    phases = torch.full_like(seen, -1)
    for row, keep in enumerate(real.bool()):
        phases[row, keep] = torch.tensor(defined(seen[row, keep].tolist(), THINK)[0])
    inside = real.bool() if scope == "all" else phases == PHASES.index(scope)
    assert torch.equal(cached[2], inside[:, width - 1 :])
    vector = recipe(thinker, scope).steps[0].intervention.vector
    with attached(thinker, SITE, lambda x: torch.where(inside[..., None], x + vector, x)):
        expected = logits(thinker, seen, real)[:, width - 1 :]
    for _, ours, _ in (cached, whole):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


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
    found = Clock(THINK).advance(torch.tensor([ids]), None, 0).phase[0].tolist()
    assert "".join("pta"[phase] for phase in found) == phases
    assert found == defined(ids, THINK)[0]


@pytest.mark.parametrize("d", [THINK, LONG], ids=["one token", "several tokens"])
def test_a_pass_knows_what_was_said_so_far_and_chunks_change_nothing_after_the_last_header(d):
    rng = random.Random(0)
    pieces = [d.turn, d.open, d.open, d.close, d.close, *((token,) for token in range(3, 13))]
    for _ in range(150):
        rows = [[t for piece in rng.choices(pieces, k=rng.randint(1, 14)) for t in piece] for _ in range(3)]
        ids, mask = padded(rows)
        width = ids.shape[1]
        one, steps = [width], list(range(1, width + 1))
        for ends in (one, steps, sorted({*rng.choices(steps, k=3), width})):
            got = follow(Clock(d), ids, mask, ends)
            for row, real, phases in zip(rows, mask.bool(), got, strict=True):
                so_far, pads = [], width - len(row)
                for end in (end - pads for end in ends if end > pads):
                    so_far += defined(row[:end], d)[0][len(so_far) :]
                assert phases[real].tolist() == so_far, (row, ends)
                whole, header = defined(row, d)
                assert phases[real].tolist()[header:] == whole[header:]
                assert (phases[~real] == -1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_have_no_phase_and_the_phases_partition_the_other_tokens(side):
    ids, mask = padded(list(ROWS.values()), side)
    phases = Clock(THINK).advance(ids, mask, 0)
    counts = sum(phases.mask(scope).long() for scope in PHASES)
    assert torch.equal(counts, mask)
    assert torch.equal(phases.masks().sum(0), mask)
    assert torch.equal(phases.mask("all"), mask.bool())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_after_the_pads_continues_the_phase_before_them(side):
    rows = list(ROWS.values())
    ids, mask = padded(rows, side)
    ids[mask == 0] = 3  # a pad says nothing, even where its id is that of a delimiter
    one = mask.new_ones(len(rows), 1)
    ids, mask = torch.cat([ids, 20 * one], dim=1), torch.cat([mask, one], dim=1)
    phases = follow(Clock(THINK), ids, mask, [ids.shape[1] - 1, ids.shape[1]])
    assert phases[:, -1].tolist() == [defined([*row, 20], THINK)[0][-1] for row in rows]


@pytest.mark.parametrize("d", [THINK, LONG], ids=["one token", "several tokens"])
def test_the_clock_thinks_where_the_thinking_span_is(d):
    asked, thought = [1, 20, *d.turn], [*d.open, 21, 22, *d.close, 23]
    opened, earlier = [*asked, *d.open], [*asked, *thought, 2, *asked]
    turns = [(asked, thought), (asked, [24, *thought]), (asked, [*d.open, 21]), (asked, [24, 25])]
    turns += [(opened, [21, *d.close, 23]), (opened, [21, 22]), (earlier, thought), (earlier, [24, 25])]
    for prompt, completion in turns:
        phases = Clock(d).advance(torch.tensor([[*prompt, *completion]]), None, 0)
        span = thinking_span(prompt, completion, d)
        inside = [] if span is None else list(range(span.first, span.end - span.closed))
        assert phases.mask("thinking")[0].nonzero().flatten().tolist() == inside


def test_a_cache_that_the_clock_did_not_see_from_its_start_is_refused():
    model = build("llama")
    cache = model(torch.tensor([[1, 7, 8, 5]]), use_cache=True).past_key_values
    sentence = "The cache holds 4 tokens of 1 rows, but the clock saw 0: it cannot .* a cache that began"
    with applied(model, recipe(model, "thinking"), must_fire=False), pytest.raises(ValueError, match=sentence):
        model(torch.tensor([[3]]), past_key_values=cache)


@pytest.mark.parametrize(("rows", "n_past"), [(1, 4), (1, 2), (2, 3)])
def test_a_clock_follows_no_other_cache_than_its_own(rows, n_past):
    clock = Clock(THINK)
    clock.advance(torch.tensor([[1, 7, 5]]), None, 0)
    sentence = f"The cache holds {n_past} tokens of {rows} rows, but the clock saw 3: it cannot follow"
    with pytest.raises(ValueError, match=sentence):
        clock.advance(torch.full((rows, 1), 3), None, n_past)


def test_beam_search_with_a_cache_is_refused():
    model = build("llama")
    ids = torch.tensor([[1, 7, 8, 5, 3]])
    mask = torch.ones_like(ids)
    with (
        applied(model, recipe(model, "thinking"), must_fire=False),
        pytest.raises(ValueError, match="follow beam search"),
    ):
        model.generate(ids, attention_mask=mask, max_new_tokens=20, num_beams=2, do_sample=False)


@pytest.mark.parametrize("scope", ["all", "thinking"])
def test_assisted_decoding_is_refused_where_the_cache_is_cut_back(scope):
    model, draft = build("llama"), build("llama", seed=1)
    ids = torch.tensor([[1, 7, 8, 5, 3]])
    steered = recipe(model, scope)
    with applied(model, steered, must_fire=False), pytest.raises(ValueError, match="cannot follow .*assisted decoding"):
        model.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=draft)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_a_static_cache_is_followed_as_a_dynamic_one(thinker, scope):
    """Beside pads, from a mask of four dimensions: the same tokens are touched, and the same logits come."""
    ids, mask = padded(list(ROWS.values()))
    found = []
    for cache in ("static", "dynamic"):
        with applied(thinker, recipe(thinker, scope), must_fire=False) as log:
            out = thinker.generate(
                ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
                cache_implementation=cache, logits_processor=scripted(ids.shape[1]), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        found.append((torch.stack(out.logits), log.positions()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1] == found[1][1]


@torch.no_grad()
def test_a_mask_that_tells_no_token_is_refused():
    model, ids = build("llama"), torch.tensor([[1, 7, 8, 5, 3]])
    with (
        applied(model, recipe(model, "thinking"), must_fire=False),
        pytest.raises(ValueError, match="has 3 dimensions"),
    ):
        model(ids, attention_mask=torch.ones(1, 5, 5))


def test_a_header_that_the_model_writes_within_its_turn_opens_none():
    """As gpt-oss between its channels: user 8, header 5, thinking 3 .. 4, header again, answer; then the next turn."""
    delimiters = Delimiters(open=(3,), close=(4,), turn=(5,), user=(8,))
    ids = torch.tensor([[8, 20, 5, 3, 21, 4, 5, 22, 8, 23, 5, 3, 24, 4, 5, 25]])
    expected = [[0] * 11 + [1, 1, 2, 2, 2]]
    whole = Clock(delimiters).advance(ids, None, 0)
    assert whole.phase.tolist() == expected
    steps, phases = Clock(delimiters), []
    for at in range(ids.shape[1]):
        phases += steps.advance(ids[:, at : at + 1], None, at).phase[0].tolist()
    assert phases[-5:] == [1, 1, 2, 2, 2]
    assert phases[3:8] == [1, 1, 2, 2, 2]  # the first turn, while it was the current one


def test_inputs_embeds_are_refused():
    model = build("llama")
    embedded = model.get_input_embeddings()(torch.tensor([[1, 7, 5]]))
    sentence = "A scope reads token ids, but the model was called with inputs_embeds."
    with applied(model, recipe(model, "answer"), must_fire=False), pytest.raises(ValueError, match=sentence):
        model(inputs_embeds=embedded)


def test_what_a_pass_was_told_is_not_changed_by_the_next_one():
    clock = Clock(THINK)
    first = clock.advance(torch.tensor([[1, 7, 5, 3]]), None, 0)
    before = first.phase.clone(), first.thought.clone(), first.position.clone()
    second = clock.advance(torch.tensor([[8, 4]]), None, 4)
    assert all(map(torch.equal, before, (first.phase, first.thought, first.position)))
    assert (first.starts, second.starts, second.position.tolist()) == (True, False, [[4, 5]])
    with pytest.raises(FrozenInstanceError):
        first.phase = second.phase
