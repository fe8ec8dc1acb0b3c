"""A direction is its formula written out in a loop, however it is batched; it travels with its birth."""

import random as chance
import re
from dataclasses import asdict

import pytest
import torch
from families import D_VOCAB, SPECIAL, build
from rich.console import Console

from probes.activations._record import span_means
from probes.activations.moments import Moments
from probes.directions.components import on_manifold, principal_components
from probes.directions.direction import Direction, direction_between, random_direction
from probes.directions.length_probe import fit_length
from probes.evidence._separation import auroc
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.delimiters import ThinkingSpan
from probes.model.loading import identity_of, tokenizer_of
from probes.model.sites import Site
from probes.tables import Table
from probes.tensors import read_tensors, write_tensors
from probes.thinking.spans import Span, text_span

A = ["w7 w8 w9 w10 w11 w12", "w20", "w13 w14"]
B = ["w15 w16 <think> w17", "w18 w19 w18 w19 w18"]
SITE = Site(0, "resid_post")


def streams(model, text):
    """The residual stream after block 0, by transformers alone."""
    ids = torch.tensor([tokenizer_of(model).encode(text)])
    return model(ids, output_hidden_states=True).hidden_states[1][0].double()


def mean_over_texts(model, texts, read):
    return sum(read(streams(model, text)) for text in texts) / len(texts)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def direction(llama):
    return direction_between(llama, A, B, SITE)


@torch.no_grad()
@pytest.mark.parametrize("position", ["text", "text_last"])
def test_a_direction_is_the_difference_of_the_means_over_texts(model, position):
    read = {"text": lambda x: x[-len(x[1:]) :].mean(0), "text_last": lambda x: x[-1]}[position]  # but the first token
    norm = {"text": lambda x: x[-len(x[1:]) :].norm(dim=-1).mean(), "text_last": lambda x: x[-1].norm()}[position]
    ours = direction_between(model, A, B, str(SITE), position=position)
    theirs = mean_over_texts(model, A, read) - mean_over_texts(model, B, read)
    torch.testing.assert_close(ours.vector.double(), theirs, atol=1e-5, rtol=0)
    assert ours.stream_norm == pytest.approx(float(mean_over_texts(model, A + B, norm)), rel=1e-5)
    assert ours.site == SITE


@torch.no_grad()
def test_swapping_the_classes_turns_a_direction_round(llama, direction):
    back = direction_between(llama, B, A, SITE)
    assert torch.equal(back.vector, -direction.vector)
    assert back.stream_norm == pytest.approx(direction.stream_norm)


@torch.no_grad()
def test_each_text_counts_once_however_long_it_is(llama):
    long, short = (direction_between(llama, [text], B, SITE).vector for text in ("w9 " * 40, "w20"))
    both = direction_between(llama, ["w9 " * 40, "w20"], B, SITE).vector
    torch.testing.assert_close(both, (long + short) / 2, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("batch_tokens", [1, 7, 12, 16_384])
def test_batches_of_any_size_read_each_text_once_and_alike(family, batch_tokens):
    model, sites = build(family), [SITE, Site(1, "z", 2), Site(2, "mlp_out")]
    spans = [text_span(model, text, position=position) for text in A + B for position in ("text", "text_last")]
    alone = [next(span_means(model, [span], sites)) for span in spans]
    seen, sizes = [], []
    for batch in span_means(model, spans, sites, batch_tokens=batch_tokens):
        texts = {spans[row].ids for row in batch.rows}
        sizes.append(len(texts) * max(map(len, texts)))
        for i, row in enumerate(batch.rows):
            seen.append(row)
            for site in sites:
                for one, all_ in ((alone[row].means, batch.means), (alone[row].norms, batch.norms)):
                    torch.testing.assert_close(all_[site][i], one[site][0], atol=1e-5, rtol=1e-5)
                assert batch.left_out[site][i] == alone[row].left_out[site][0]
    assert sorted(seen) == list(range(len(spans)))
    assert all(size <= max(batch_tokens, 6) for size in sizes)


def test_moments_merge_in_any_order_and_grouping():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    whole = Moments.of(rows)
    a, b, c = (Moments.of(part) for part in rows.split([3, 20, 7]))
    for merged in (
        (a + b) + c,
        a + (b + c),
        c + a + b,
        sum((Moments.of(row[None]) for row in rows[1:]), Moments.of(rows[:1])),
    ):
        assert merged.count == 30
        torch.testing.assert_close(merged.mean, rows.double().mean(0), atol=1e-12, rtol=0)
        torch.testing.assert_close(merged.total, whole.total, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="The mean of no rows is asked for"):
        _ = Moments.of(rows[:0]).mean


def test_a_direction_carries_its_birth(llama, direction):
    birth = direction.provenance
    assert (birth.estimator, birth.n_positive, birth.n_negative) == ("difference in means", 3, 2)
    assert birth.model == identity_of(llama)
    data = [direction_between(llama, *texts, SITE).provenance.data for texts in ((A[::-1], B), (B, A), (A, [*B, "w7"]))]
    assert data[0] == birth.data
    assert len({birth.data, *data}) == 3


def test_what_is_saved_is_what_is_loaded_to_the_bit(direction, tmp_path):
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(again.vector, direction.vector)
    assert (again.site, again.stream_norm) == (direction.site, direction.stream_norm)
    assert again.provenance == direction.provenance


def test_a_file_that_is_not_a_whole_direction_is_refused(direction, tmp_path):
    path = tmp_path / "d.safetensors"
    direction.save(path)
    whole, (tensors, words) = path.read_bytes(), read_tensors(path)
    birth = asdict(direction.provenance)
    for cut in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="d.safetensors is not a whole safetensors file .* truncated"):
            Direction.load(path)
    for changed, sentence in (
        ((tensors, words | {"unit": 1}), "d.safetensors has unknown keys: unit. Known: kind, site, stream_norm, prov"),
        ((tensors, {}), "d.safetensors lacks keys: kind, site, stream_norm, provenance."),
        ((tensors | {"bias": torch.ones(1)}, words), "d.safetensors has unknown keys: bias. Known: vector."),
        (({"v": torch.ones(1)}, words), "d.safetensors has unknown keys: v."),
        ((tensors, words | {"provenance": birth | {"who": 1}}), "The provenance in .* has unknown keys: who."),
        ((tensors, words | {"provenance": {}}), "The provenance in .* lacks keys: model, estimator"),
    ):
        write_tensors(path, *changed)
        with pytest.raises(ValueError, match=sentence):
            Direction.load(path)


def test_an_empty_class_is_refused_and_an_empty_text(llama):
    with pytest.raises(ValueError, match="A direction needs both classes, but got 3 positive and 0 negative."):
        direction_between(llama, A, [], SITE)
    with pytest.raises(ValueError, match="A direction needs both classes, but got 0 positive and 2 negative."):
        direction_between(llama, [], B, SITE)
    for position in ("text", "text_last"):
        with pytest.raises(ValueError, match="are not in a sequence of 0 tokens."):
            direction_between(llama, [""], B, SITE, position=position)


def test_classes_of_the_same_texts_give_a_zero_vector_that_has_no_unit(llama):
    nothing = direction_between(llama, A, A, SITE)
    assert nothing.norm == 0
    with pytest.raises(ValueError, match="The direction at L0.resid_post is zero: both classes have the same mean."):
        _ = nothing.unit


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "norm", "centred"),
    [
        ("llama", "model.norm", False),
        ("gemma2", "model.norm", False),
        ("gpt2", "transformer.ln_f", True),
        ("cohere2", "model.norm", True),
    ],
)
def test_the_tokens_of_a_direction_are_those_that_the_model_itself_reads_in_it(family, norm, centred):
    """The final norm of c v̂, less that of 0, is the direction over its root mean square: c only drowns epsilon."""
    model = build(family)
    direction = direction_between(model, A, B, SITE)
    unit, final = direction.unit, model.get_submodule(norm)
    scale = (unit - centred * unit.mean()).square().mean().sqrt()
    read = model.get_output_embeddings().weight @ (final(1000 * unit) - final(torch.zeros(32))) * scale
    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), D_VOCAB))]
    table = direction.tokens(model, D_VOCAB)
    for column, largest in ((0, True), (2, False)):
        values, ids = read.sort(descending=largest)
        shown = torch.tensor([row[column + 1] for row in table.rows])
        torch.testing.assert_close(shown, values, atol=1e-4, rtol=1e-4)
        assert [row[column] for row in table.rows][:3] == [names[i] for i in ids[:3]]
        assert sorted(row[column] for row in table.rows) == sorted(names)
    assert direction.tokens(model, 4).rows == table.rows[:4]
    frame = direction.tokens(model, 4).to_frame()
    assert (tuple(frame.columns), frame.shape) == (table.columns, (4, 4))
    assert [tuple(row) for row in frame.itertuples(index=False)] == list(table.rows[:4])


def test_a_random_direction_has_the_same_norm_and_another_way(direction):
    drawn = [random_direction(direction, seed=seed) for seed in (0, 0, 1)]
    assert [d.norm for d in drawn] == pytest.approx([direction.norm] * 3, rel=1e-5)
    assert torch.equal(drawn[0].vector, drawn[1].vector)
    assert not torch.allclose(drawn[0].vector, drawn[2].vector)


def test_in_a_notebook_a_direction_and_a_completion_show_themselves_and_escape_tags(llama, direction):
    page = direction._repr_html_()
    assert "L0.resid_post" in page
    assert direction.provenance.model["fingerprint"] in page
    tokens = direction.tokens(llama, D_VOCAB)._repr_html_()
    span, thought = ThinkingSpan(start=2, first=2, end=5, closed=True), "<think> is 1 < 2 & 3?"
    told = Completion("0", 0, "<bos> ask ?", thought, "<b>", (1, 5), (3, 9, 4, 2), span, "eos", Sampling(), "m")
    page = told._repr_html_()
    assert "&lt;think&gt; is 1 &lt; 2 &amp; 3?" in page
    assert "3 thinking tokens" in page
    for text in (page, tokens):
        assert "&lt;bos&gt;" in text
        assert not re.search("<(think|bos|b)>", text)


def test_in_a_terminal_a_table_shows_tokens_that_look_like_markup():
    console = Console(width=60)
    with console.capture() as shown:
        console.print(Table(("token [x]",), (("[bold]",), ("[/THINK]",)), "after [INST]"))
    for text in ("token [x]", "[bold]", "[/THINK]", "after [INST]"):
        assert text in shown.get()


def test_auroc_is_the_share_of_pairs_in_order_and_ties_count_half():
    rng = chance.Random(0)
    for _ in range(20):
        a, b = ([float(rng.randrange(8)) for _ in range(rng.randint(1, 12))] for _ in range(2))
        pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
        assert auroc(torch.tensor(a), torch.tensor(b)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert auroc(torch.tensor(b), torch.tensor(a)) == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.5])) == 1
    assert auroc(torch.ones(5), torch.ones(3)) == 0.5


def test_directions_at_one_site_add_up_and_others_are_refused():
    model, other = build("llama"), build("llama", seed=1)
    texts = (["w7 w8", "w9"], ["w10", "w11 w12"])
    a = direction_between(model, *texts, "L1.resid_post")
    b = direction_between(model, ["w20"], ["w21"], "L1.resid_post")
    torch.testing.assert_close((a - 0.5 * b).vector, a.vector - 0.5 * b.vector)
    torch.testing.assert_close((a - b + b).vector, a.vector)
    assert torch.equal((-a).vector, (a * -1).vector)
    assert (a - 0.5 * b).provenance.estimator == "(difference in means) + (-1 (0.5 (difference in means)))"
    assert len({d.provenance.data for d in (a, b, a + b)}) == 3
    with pytest.raises(ValueError, match="Directions at L1.resid_post and L2.resid_post do not add up"):
        a + direction_between(model, *texts, "L2.resid_post")
    with pytest.raises(ValueError, match="do not add up: two models"):
        a + direction_between(other, *texts, "L1.resid_post")


def test_the_components_are_those_of_all_activations_and_a_direction_is_split_by_them():
    model, site = build("llama"), Site(1, "resid_post")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 97, (n,), generator=generator).tolist() for n in (5, 9, 14, 20)]
    spans = [Span(tuple(row), 1, len(row)) for row in rows]
    components, share = principal_components(model, spans, site, k=6)
    with torch.no_grad():
        runs = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[2] for row in rows]
    states = torch.cat([run[0, 1:] for run in runs])
    centred = (states - states.mean(0)).double()
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((components.double() @ vectors[:6].T).abs(), torch.eye(6).double(), atol=1e-4, rtol=0)
    assert share == pytest.approx(float(values[:6].square().sum() / values.square().sum()), rel=1e-5)

    direction = direction_between(model, ["w7 w8"], ["w10"], site)
    part = on_manifold(direction, components)
    rest = direction - part
    torch.testing.assert_close(components @ rest.vector, torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(on_manifold(part, components).vector, part.vector, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="40 principal components are asked for, of 44 positions of width 32"):
        principal_components(model, spans, site, k=40)


def test_a_length_probe_finds_what_was_planted_and_says_how_well_it_does():
    """The embedding of the last prompt token is what tells the length: the probe must read it off the stream."""
    model, site = build("llama"), Site(0, "resid_pre")
    embedding = model.get_input_embeddings().get_parameter("weight").detach()
    planted = torch.randn(32, generator=torch.Generator().manual_seed(3))
    done = []
    for i in range(160):
        opener = 10 + i % 80
        length = max(1, round(20 + 4 * float(embedding[opener] @ planted)))
        ids = (opener, *[7] * length, 4, 8)
        span = ThinkingSpan(start=2, first=2, end=3 + length + 1, closed=True)
        done.append(Completion(str(i), 0, "", "", "", (1, 5), ids, span, "eos", Sampling(), "m"))
    probe = fit_length(model, done, site, ridge=1e-9)
    assert probe.r2 > 0.97
    cosine = torch.nn.functional.cosine_similarity(probe.vector, planted, dim=0)
    assert cosine > 0.99
    with pytest.raises(ValueError, match="A length probe needs 20 completions .* but 3 of 3 do"):
        fit_length(model, done[:3], site)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_sequence_is_read_once_however_many_spans_it_has_and_each_is_what_it_is_alone(name):
    model, rng = build(name), chance.Random(name)
    rows = [tuple(rng.randrange(5, 60) for _ in range(rng.randrange(6, 20))) for _ in range(5)]
    spans = []
    for _ in range(40):
        ids = rng.choice(rows)
        start = rng.randrange(len(ids))
        spans.append(Span(ids, start, rng.randrange(start, len(ids)) + 1))
    sites = [Site(1, "resid_post"), Site(0, "z", head=1), Site(2, "mlp_out")]
    seen = []
    model.base_model.embed_tokens.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    together = {site: {} for site in sites}
    for batch in span_means(model, spans, sites, batch_tokens=40):
        for site in sites:
            facts = zip(batch.means[site], batch.norms[site], batch.left_out[site], batch.shares[site], strict=True)
            together[site] |= dict(zip(batch.rows, facts, strict=True))
    assert sum(seen) == len({span.ids for span in spans})
    for number, span in enumerate(spans):
        (alone,) = span_means(model, [span], sites)
        for site in sites:
            facts = (alone.means[site][0], alone.norms[site][0], alone.left_out[site][0], alone.shares[site][0])
            for one, other in zip(together[site][number], facts, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
