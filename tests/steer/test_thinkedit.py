"""ThinkEdit equals its formulas written out in loops, and finds what was planted."""

from typing import get_args

import pytest
import torch
from families import build

from probes.activations import head_writes
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.architectures import block_of, head_matrices, o_proj_of
from probes.model.delimiters import thinking_span
from probes.model.hooks import captured
from probes.model.loading import delimiters_of
from probes.model.sites import Site
from steer.folding._fold import folded
from steer.methods.thinkedit import PUBLISHED, LengthReading, LengthSplit, Position
from steer.runtime._applied import applied

THINK, END, TURN = 3, 4, 5


def completion(model, prompt, thought, answer=(9,), closed=True, name="0"):
    prompt_ids = (1, *prompt, TURN)
    ids = (THINK, *thought, *((END, *answer, 2) if closed else ()))
    span = thinking_span(prompt_ids, ids, delimiters_of(model))
    stop = "eos" if closed else "length"
    return Completion(name, 0, "", "", "", prompt_ids, ids, span, stop, Sampling(), "tiny")


def sample(model, n, length, seed):
    """n completions of about `length` thoughts, no two alike."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(6, 97, (k,), generator=rng).tolist()  # noqa: E731
    return [completion(model, draw(3 + i % 4), draw(length + i % 3)) for i in range(n)]


def by_the_formula(model, short, long, w=1.0):
    """ThinkEdit, line by line: v, head scores, and o_proj after editing head (1, 2), all in float64."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads

    def read(c):
        seen = {}
        handles = []
        for layer in range(layers):
            block = block_of(model, layer)
            handles.append(
                block.post_attention_layernorm.register_forward_pre_hook(
                    lambda _m, args, layer=layer: seen.update({("mid", layer): args[0][0].double()})
                )
            )
            handles.append(
                block.self_attn.o_proj.register_forward_pre_hook(
                    lambda _m, args, layer=layer: seen.update({("z", layer): args[0][0].double()})
                )
            )
        model(torch.tensor([c.all_ids]))
        for handle in handles:
            handle.remove()
        start = len(c.prompt_ids)
        end = start + c.ids.index(END) + 1
        return seen, range(start - 1, end - 1)

    means = {}
    for name, group in (("short", short), ("long", long)):
        total = torch.zeros(layers, 32, dtype=torch.float64)
        for c in group:
            seen, positions = read(c)
            for layer in range(layers):
                total[layer] += sum(seen["mid", layer][t] for t in positions) / len(positions) / len(group)
        means[name] = total
    v = means["long"] - means["short"]
    scores = torch.zeros(layers, heads, dtype=torch.float64)
    for c in short:
        seen, positions = read(c)
        for layer in range(layers):
            weight = o_proj_of(model, layer).weight.double()
            k = weight.shape[1] // heads
            unit = v[layer] / v[layer].norm()
            for head in range(heads):
                block = weight[:, head * k : (head + 1) * k]
                for t in positions:
                    write = block @ seen["z", layer][t][head * k : (head + 1) * k]
                    scores[layer, head] += (write @ -unit) / len(positions) / len(short)
    weight = o_proj_of(model, 1).weight.double().clone()
    k = weight.shape[1] // heads
    unit = v[1] / v[1].norm()
    eye = torch.eye(32, dtype=torch.float64)
    weight[:, 2 * k : 3 * k] = (eye - w * torch.outer(unit, unit)) @ weight[:, 2 * k : 3 * k]
    return v, scores, weight


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "deepseek_v3"])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_direction_scores_and_edit_are_those_of_the_formula(family, weight):
    model = build(family)
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12))
    v, scores, edited = by_the_formula(model, short, long, weight)
    ours = torch.stack([d.vector for d in reading.directions]).double()
    torch.testing.assert_close(ours, v, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reading.scores("raw").scores, scores, atol=1e-6, rtol=1e-6)
    twin = folded(model, reading.edit([(1, 2)], weight=weight))
    torch.testing.assert_close(o_proj_of(twin, 1).weight.double(), edited, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_centred_ranking_is_short_less_long_and_top_is_by_signed_value():
    model = build("qwen3")
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12))
    flipped = LengthReading.of(model, LengthSplit(tuple(long), tuple(short), 0, 0))
    torch.testing.assert_close(flipped.short_writes, -reading.long_writes)
    raw, centred = reading.scores("raw"), reading.scores("centred")
    torch.testing.assert_close(centred.scores, reading.long_writes - reading.short_writes)
    order = raw.top(12)
    assert [raw[head] for head in order] == sorted((raw[head] for head in order), reverse=True)
    assert raw.bottom(3) == order[::-1][:3]
    assert reading.count(PUBLISHED.heads) == 1
    assert reading.count(0.5) == 6
    with pytest.raises(ValueError, match="13 heads are asked for, but the model has 12"):
        reading.count(13)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_random_reading_is_of_what_was_read_and_runs_no_model(family):
    model = build(family)
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12))
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    null = reading.at_random(3)
    handle.remove()
    assert not passes
    spans = reading.split.spans("thinking")
    for ours, own in zip((null.short_writes, null.long_writes), spans, strict=True):
        torch.testing.assert_close(ours, head_writes(model, own, dict(enumerate(null.units))))
    assert not torch.allclose(null.short_writes, reading.short_writes)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_behind_a_post_norm_the_direction_leaves_the_stream(family):
    """All heads projected: what attention adds to the stream has no part along v̂, though it passes a norm."""
    model = build(family)
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12))
    twin = folded(model, reading.edit([(1, head) for head in range(4)]))
    ids, v = torch.tensor([short[0].all_ids]), reading.directions[1].unit
    site = Site(1, "attn_out")
    with captured(model, [site]) as before:
        model(ids)
    with captured(twin, [site]) as after:
        twin(ids)
    assert float((before[site] @ v).abs().max()) > 1e-2
    assert float((after[site] @ v).abs().max()) < 1e-6


def planted():
    """A model in which head (1, 2) writes d wherever token 20 came before, and attention does nothing else.

    Tags and thoughts are embedded alike, so that their shares in a mean do not matter.
    """
    model = build("llama")
    d = torch.randn(32, generator=torch.Generator().manual_seed(7))
    d[31] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 31] = 0
        model.model.embed_tokens.weight[20] = 0
        model.model.embed_tokens.weight[[THINK, TURN, 30, 31, 32]] = model.model.embed_tokens.weight[30].clone()
        model.model.embed_tokens.weight[20, 31] = 8.0
        for layer in range(3):
            o_proj_of(model, layer).weight.mul_(1e-3)
            block_of(model, layer).mlp.down_proj.weight[31] = 0
            o_proj_of(model, layer).weight[31] = 0
        block_of(model, 1).self_attn.v_proj.weight[8] = 0
        block_of(model, 1).self_attn.v_proj.weight[8, 31] = 1.0  # first channel of key-value head 1
        o_proj_of(model, 1).weight[:, 16] = d  # first channel of head 2, which reads that head
    return model, d / d.norm()


@torch.no_grad()
@pytest.mark.parametrize("position", get_args(Position))
def test_a_planted_direction_and_its_head_are_found_and_removed(position):
    """Prompts with token 20 think briefly; thinking tokens are the same in both classes."""
    model, d = planted()
    thought, rng = [30, 31, 32], torch.Generator().manual_seed(9)
    prompts = [torch.randint(40, 90, (4,), generator=rng).tolist() for _ in range(12)]
    short = [completion(model, [20, *p], thought) for p in prompts]
    long = [completion(model, [21, *p], thought * 4) for p in prompts]
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=9), position=position)
    assert float(reading.directions[1].unit @ -d) >= 0.99
    assert reading.scores("raw").top(1) == reading.scores("centred").top(1) == [(1, 2)]

    twin = folded(model, reading.edit([(1, 2)]))
    site, unit = Site(1, "result", 2), reading.directions[1].unit
    with captured(model, [site]) as before:
        model(torch.tensor([short[0].all_ids]))
    with captured(twin, [site]) as after:
        twin(torch.tensor([short[0].all_ids]))
    assert float((before[site] @ unit).abs().max()) > 0.1
    assert float((after[site] @ unit).abs().max()) < 1e-6
    for layer in range(3):
        for head in range(4):
            same = torch.equal(head_matrices(twin, layer)[:, head], head_matrices(model, layer)[:, head])
            assert same == ((layer, head) != (1, 2))


def test_kinds_set_the_write_to_zero_to_the_long_mean_or_to_the_long_side():
    model = build("llama+bias")
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12))
    write, unit = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)), reading.units[1]
    edits = {k: reading.edit([(1, 2)], kind=k).steps[0].intervention for k in ("project", "replace", "one_sided")}
    along = {kind: edit(write) @ unit for kind, edit in edits.items()}
    torch.testing.assert_close(along["project"], torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(along["replace"], torch.full((50,), float(reading.long_writes[1, 2])), atol=1e-5, rtol=0)
    torch.testing.assert_close(along["one_sided"], (write @ unit).clamp(min=0), atol=1e-5, rtol=0)
    for edit in edits.values():
        across = edit(write) - torch.outer(edit(write) @ unit, unit)
        torch.testing.assert_close(across, write - torch.outer(write @ unit, unit), atol=1e-5, rtol=0)


def test_a_split_leaves_out_what_never_closed_and_refuses_one_class():
    model = build("llama")
    closed = [completion(model, [7], [30] * n) for n in (2, 3, 4, 20, 30, 40)]
    never = completion(model, [7], [30] * 50, closed=False)
    split = LengthSplit.at([*closed, never], below=10, above=10, minimum=3)
    assert [c.thinking_tokens for c in split.short] == [4, 5, 6]
    assert [c.thinking_tokens for c in split.long] == [22, 32, 42]
    with pytest.raises(
        ValueError,
        match="Of 7 completions, 3 think in fewer than 10 tokens and 0 in more than 1000, but each class needs",
    ):
        LengthSplit.at([*closed, never], below=10, minimum=3)
    with pytest.raises(ValueError, match="none closed its thinking"):
        LengthSplit.by_quantile([never])
    quantiles = LengthSplit.by_quantile(closed, share=0.5, minimum=3)
    assert (quantiles.short, quantiles.long) == (split.short, split.long)


@torch.no_grad()
@pytest.mark.parametrize(("site", "into"), [("resid_mid", "attn_out"), ("resid_post", "mlp_out")])
def test_steering_adds_the_raw_direction_of_each_layer_to_what_it_adds_to_the_stream(site, into):
    model = build("qwen3")
    short, long = sample(model, 11, 4, seed=1), sample(model, 10, 12, seed=2)
    reading = LengthReading.of(model, LengthSplit.at([*short, *long], below=9, above=12), site=site)
    first = Site(0, into)
    with captured(model, [first]) as plain:
        model(torch.tensor([short[0].all_ids]))
    with applied(model, reading.steering(0.5)), captured(model, [first]) as steered:
        model(torch.tensor([short[0].all_ids]))
    added = (steered[first] - plain[first]).flatten(0, 1)
    torch.testing.assert_close(added, 0.5 * reading.directions[0].vector.expand_as(added), atol=1e-5, rtol=0)
    assert [step.intervention.site for step in reading.steering(1.0, layers=[1]).steps] == [Site(1, into)]
