"""A direction is the difference of means that a loop over texts would give, and carries its birth in its file."""

import pytest
import torch
from families import build
from safetensors.torch import save_file

from probes.activations import Span, record, span_means
from probes.directions import Direction, difference_in_means, direction_between, random_direction
from probes.evidence import auroc, project
from probes.models import load, tokenizer_of
from probes.sites import Site
from probes.statistics import Moments

A = ["w7 w8 w9 w10", "w11", "w12 w13 w14 w15 w16 w17 w18"]
B = ["w20 w21", "w22 w23 w24 w25 w26"]
SITE = Site(0, "resid_post")


def by_a_loop(model, texts, *, last):
    total = torch.zeros(32, dtype=torch.float64)
    for text in texts:
        hidden = model(torch.tensor([tokenizer_of(model).encode(text)]), output_hidden_states=True).hidden_states[1]
        total += (hidden[0, -1] if last else hidden[0].double().mean(0)).double() / len(texts)
    return total


@torch.no_grad()
@pytest.mark.parametrize("position", ["mean", "last"])
def test_it_is_the_difference_of_the_means_of_texts(model, position):
    ours = direction_between(model, A, B, SITE, position=position)
    expected = by_a_loop(model, A, last=position == "last") - by_a_loop(model, B, last=position == "last")
    torch.testing.assert_close(ours.vector.double(), expected, atol=1e-5, rtol=0)
    swapped = direction_between(model, B, A, "L0.resid_post", position=position)
    torch.testing.assert_close(swapped.vector, -ours.vector, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_stream_norm_is_the_mean_norm_of_tokens_then_of_texts():
    model = build("llama")
    norms = []
    for text in A + B:
        ids = torch.tensor([tokenizer_of(model).encode(text)])
        norms.append(float(model(ids, output_hidden_states=True).hidden_states[1][0].norm(dim=-1).mean()))
    assert direction_between(model, A, B, SITE).stream_norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)


@torch.no_grad()
def test_batches_of_any_size_read_the_same():
    model, rng = build("qwen3_moe"), torch.Generator().manual_seed(0)
    ids = [torch.randint(6, 97, (4 + 3 * i,), generator=rng).tolist() for i in range(6)]
    spans = [Span(tuple(row), i % 3, len(row) - i % 2) for i, row in enumerate(ids)]
    sites = [Site(0, "resid_mid"), Site(2, "z"), Site(1, "result", 1)]
    whole = {}
    for budget in (1, 40, 10_000):
        for rows, means, _ in span_means(model, spans, sites, batch_tokens=budget):
            for site in sites:
                for row, mean in zip(rows, means[site], strict=True):
                    torch.testing.assert_close(mean, whole.setdefault((site, row), mean), atol=1e-5, rtol=0)
    assert len(whole) == len(sites) * len(spans)
    with pytest.raises(ValueError, match="Positions 3 to 9 are not in a sequence of 5 tokens"):
        Span((1, 2, 3, 4, 5), 3, 9)


def test_moments_merge_in_any_grouping():
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    a, b, c = (Moments.of(part) for part in rows.split([5, 17, 8]))
    for merged in ((a + b) + c, a + (b + c), c + a + b):
        assert merged.count == 30
        torch.testing.assert_close(merged.mean, rows.double().mean(0), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="The mean of no rows"):
        _ = Moments.of(rows[:0]).mean


@torch.no_grad()
def test_layers_above_the_highest_site_are_not_computed(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model.model.layers[2], "forward", lambda *_, **__: pytest.fail("layer 2 ran"))
    record(model, [Span((7, 8, 9), 0, 3)], [Site(1, "resid_post")])


def test_it_is_the_same_in_a_file(tmp_path):
    model = build("llama")
    direction = direction_between(model, A, B, SITE)
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(again.vector, direction.vector)
    assert (again.site, again.stream_norm, again.provenance) == (SITE, direction.stream_norm, direction.provenance)
    assert (again.provenance.n_positive, again.provenance.n_negative) == (3, 2)
    assert "L0.resid_post" in again._repr_html_()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Direction.load(tmp_path / "cut.safetensors")
    save_file({"vector": direction.vector}, tmp_path / "x.safetensors", {"thinksteer": '{"kind": "direction", "x": 1}'})
    with pytest.raises(ValueError, match="x.safetensors has unknown keys: x"):
        Direction.load(tmp_path / "x.safetensors")


def test_a_contrast_without_one_side_or_without_difference_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="needs both classes, but got 3 positive and 0 negative"):
        direction_between(model, A, [], SITE)
    with pytest.raises(ValueError, match="The direction at L0.resid_post is zero: both classes have the same mean"):
        _ = direction_between(model, A, A, SITE).unit


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere2"])
def test_its_tokens_are_what_it_moves_in_the_logits(family):
    """To first order: the logits of a stream pushed far along the direction are ranked as the table ranks them."""
    model = build(family)
    direction = direction_between(model, A, B, Site(2, "resid_post"))
    far = model.get_submodule("transformer.ln_f" if family == "gpt2" else "model.norm")(1e6 * direction.unit)
    base = model.get_submodule("transformer.ln_f" if family == "gpt2" else "model.norm")(torch.zeros(32))
    moved = (far - base) @ model.get_output_embeddings().weight.T
    table = direction.tokens(model, 5)
    names = [tokenizer_of(model).decode([i]) for i in range(97)]
    assert [row[0] for row in table.rows] == [names[i] for i in moved.topk(5).indices]
    assert [row[2] for row in table.rows] == [names[i] for i in moved.topk(5, largest=False).indices]
    assert table.to_frame().columns.tolist() == ["raises", "by", "lowers", "by "]


def test_a_random_direction_has_the_same_norm_and_another_way():
    model = build("llama")
    direction = direction_between(model, A, B, SITE)
    drawn = [random_direction(direction, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].vector, drawn[1].vector)
    assert not torch.equal(drawn[0].vector, drawn[2].vector)
    assert all(d.norm == pytest.approx(direction.norm, rel=1e-6) for d in drawn)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 6, (40,), generator=rng).double(), torch.randint(0, 5, (30,), generator=rng).double()
    pairs = [(x > y) + 0.5 * (x == y) for x in a.tolist() for y in b.tolist()]
    assert auroc(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(b, a) == pytest.approx(1 - auroc(a, b))
    assert auroc(a + 10, b) == 1.0


def test_projections_come_in_the_order_of_the_spans():
    model = load("organism")
    texts = ["a 3 b +4", "a 1", "a 2 b +1 c -2"]
    spans = [Span(tuple(tokenizer_of(model).encode(t)), 0, len(t.split())) for t in texts]
    direction = difference_in_means(model, spans[:1], spans[1:], [Site(1, "resid_post")])[Site(1, "resid_post")]
    together = project(model, spans, [direction])[0]
    alone = torch.cat([project(model, [span], [direction])[0] for span in spans])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
