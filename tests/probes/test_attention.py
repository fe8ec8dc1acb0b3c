"""What answers pay to a span, read under SDPA, is what the eager weights say; and reading it leaves nothing behind."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, UNLISTED_MOE, build, build_tokenizer
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from probes import Site, attached, generate, load
from probes.activations import Attended, SpanAttention, drop, filler_span, locate, span_attention
from probes.activations import _interface as interface
from probes.activations._attending import Question, attending
from probes.model import decode, encode_prompt, tokenizer_of

WINDOWED = ("mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss")
# Hybrids, and the layers of the tiny model that attend.
HYBRIDS = {
    "qwen3_next": (1,), "qwen3_5_text": (1,), "falcon_h1": (0, 1, 2), "jamba": (1,), "granitemoehybrid": (1,),
    "nemotron_h": (2,), "olmo_hybrid": (2,), "minimax": (0, 2), "lfm2_moe": (1,),
}  # fmt: skip
# What else a family does to its scores or its keys: more sinks and caps, latent keys, other scalings.
OTHERS = ("mimo_v2_flash", "flint", "vaultgemma", "gemma4_text", "llama4_text", "bitnet", "deepseek_v2", "opt")


def ids_of(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(6, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


ROWS = [
    Attended(ids_of(19, 1), keys=(2, 3, 4), prompt=9, start=13, stop=18),
    Attended(ids_of(11, 2), keys=(5, 1), prompt=7, start=7, stop=11),
    Attended(ids_of(26, 3), keys=(0,), prompt=12, start=20, stop=26),
]


def eager_weights(model: PreTrainedModel, row: Attended) -> torch.Tensor:
    """[layers heads steps pos] of the same weights under the family's own eager attention."""
    own = deepcopy(model)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        weights = own(torch.tensor([row.ids]), output_attentions=True).attentions
    size = (len(row.ids), len(row.ids))
    weights = [layer[0] for layer in weights if layer is not None and layer.shape[-2:] == size]  # not of linear ones
    return torch.stack([layer[:, row.start - 1 : row.stop - 1].float() for layer in weights])


def assert_agrees(model: PreTrainedModel, rows: list[Attended] = ROWS, tolerance: float = 1e-4) -> list[SpanAttention]:
    found = span_attention(model, rows)
    for row, read in zip(rows, found, strict=True):
        weights = eager_weights(model, row)
        mass, prompt = weights[..., list(row.keys)].sum(-1), weights[..., : row.prompt].sum(-1)
        torch.testing.assert_close(read.mass, mass, rtol=0, atol=tolerance)
        seen = prompt > 1e-3
        torch.testing.assert_close(read.share[seen], (mass / prompt)[seen], rtol=0, atol=max(tolerance, 1e-3))
        torch.testing.assert_close(read.mean, mass / len(row.keys), rtol=0, atol=tolerance)
        torch.testing.assert_close(
            read.by_layer(), weights[..., list(row.keys)].mean((1, 2, 3)), rtol=0, atol=tolerance
        )
    return found


def windowed(family: str, width: int) -> PreTrainedModel:
    model = build(family)
    model.config.sliding_window = width
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED_MOE])
def test_what_is_read_is_what_the_eager_weights_say(family):
    """Grouped keys, soft caps, sinks and latent attention among them; three rows of three lengths in one batch."""
    for read, row in zip(assert_agrees(build(family)), ROWS, strict=True):
        assert read.layers == (0, 1, 2)
        assert read.mass.shape == read.share.shape == (3, 4, row.stop - row.start)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_shorter_than_the_text_hides_what_is_far(family):
    model = windowed(family, 5)
    *_, far = assert_agrees(model)  # its key is 19 tokens before its first query
    sliding = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    for layer, kind in enumerate(sliding):
        if kind == "sliding_attention":
            assert far.mass[layer].eq(0).all()
            assert far.share[layer].isnan().all()  # nothing of the prompt is in sight
        else:
            assert far.mass[layer].gt(0).all()


def test_a_soft_cap_that_binds_is_read_and_computed():
    model = build("gemma2")
    for block in model.model.layers:
        block.self_attn.attn_logit_softcapping = 0.3
    assert_agrees(model)
    ids = torch.tensor([ids_of(17, 5)])
    torch.testing.assert_close(outputs(model, ids, True), outputs(model, ids, False), rtol=1e-5, atol=1e-5)
    assert (outputs(model, ids, False) - outputs(build("gemma2"), ids, False)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_hybrid_is_read_where_it_attends(model_type):
    for read in assert_agrees(load(tiny_model(model_type), tokenizer=build_tokenizer())):
        assert read.layers == HYBRIDS[model_type]


@pytest.mark.parametrize("model_type", OTHERS)
def test_families_that_attend_in_ways_of_their_own_are_read_too(model_type):
    assert_agrees(load(tiny_model(model_type), tokenizer=build_tokenizer()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_in_bfloat16_it_agrees_as_far_as_bfloat16_goes(family):
    assert_agrees(build(family, dtype=torch.bfloat16), tolerance=0.02)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_row_reads_the_same_alone_and_beside_longer_ones(family):
    model = windowed(family, 5) if family in WINDOWED else build(family)
    together = span_attention(model, ROWS)
    for read, row in zip(together, ROWS, strict=True):
        for alone in span_attention(model, [row]), span_attention(model, [row], batch_tokens=1):
            torch.testing.assert_close(read.mass, alone[0].mass, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(read.share, alone[0].share, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_rows_of_one_text_are_read_in_one_pass():
    model, passes = build("llama"), []
    whole = [replace(ROWS[0], keys=keys) for keys in ((2, 3), (5,), (8, 1, 0))]
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    read = span_attention(model, whole)
    handle.remove()
    assert passes == [1]
    for one, row in zip(read, whole, strict=True):
        (alone,) = span_attention(model, [row])
        torch.testing.assert_close(one.mass, alone.mass)
        assert one.n_keys == len(row.keys)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_the_weights_of_a_step_sum_to_one_but_for_what_a_sink_takes(family):
    """All that the first answer's step sees is the prompt: its share of the prompt is 1, and so is its mass."""
    row = Attended(ids_of(12, 4), keys=tuple(range(9)), prompt=9, start=9, stop=10)
    (read,) = span_attention(build(family), [row])
    torch.testing.assert_close(read.share, torch.ones(3, 4, 1))
    if family == "gpt_oss":
        assert ((read.mass > 0) & (read.mass < 0.999)).all()
    else:
        torch.testing.assert_close(read.mass, torch.ones(3, 4, 1))


def outputs(model: PreTrainedModel, ids: torch.Tensor, read: bool) -> torch.Tensor:
    questions = [Question(2, ids.shape[1], 4, ((1, 2),))] * len(ids)
    with torch.no_grad():
        if not read:
            return model(ids).logits
        with attending(model, questions) as found:
            logits = model(ids).logits
        assert found
        return logits


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED_MOE])
@pytest.mark.parametrize("fewest", [1, 2**20])
def test_the_model_computes_what_it_did(family, fewest, monkeypatch):
    """Also where soft caps and sinks are computed a query or two at a time."""
    monkeypatch.setattr(interface, "_FEWEST_SCORES", fewest)
    model = windowed(family, 5) if family in WINDOWED else build(family)
    ids = torch.tensor([ids_of(17, 5), ids_of(17, 6)])
    torch.testing.assert_close(outputs(model, ids, True), outputs(model, ids, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt_neox"])
def test_chunks_change_nothing(family, monkeypatch):
    model = windowed(family, 5) if family in WINDOWED else build(family)
    whole = span_attention(model, ROWS)
    monkeypatch.setattr(interface, "_FEWEST_SCORES", 1)
    for a, b in zip(whole, span_attention(model, ROWS), strict=True):
        torch.testing.assert_close(a.mass, b.mass, rtol=1e-5, atol=1e-7)


def test_a_model_that_was_loaded_eager_is_read_too():
    model = build("llama")
    model.set_attn_implementation("eager")
    assert_agrees(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_copy_that_is_made_meanwhile_computes_the_same(family):
    model, ids = build(family), torch.tensor([ids_of(17, 5)])
    with attending(model, [Question(2, 17, 4, ((1, 2),))]) as found:
        own = deepcopy(model)
    torch.testing.assert_close(outputs(own, ids, False), outputs(model, ids, False), rtol=1e-5, atol=1e-5)
    assert not found


@pytest.mark.parametrize(("family", "former"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")])
def test_the_implementation_is_restored_even_after_an_error(family, former):
    model = build(family)
    span_attention(model, ROWS)
    assert model.config._attn_implementation == former

    def fail(_: torch.Tensor) -> None:
        assert model.config._attn_implementation == interface.NAME
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), attached(model, Site(1, "resid_pre"), fail):
        span_attention(model, ROWS)
    assert model.config._attn_implementation == former
    assert model not in interface._SESSIONS
    assert_agrees(model)


def test_the_configs_inside_a_wrapper_are_restored_one_by_one():
    model = load(tiny_model("gemma3"), tokenizer=build_tokenizer())
    model.config.vision_config._attn_implementation = "eager"
    before = [model.config._attn_implementation, model.config.text_config._attn_implementation, "eager"]
    (read,) = span_attention(model, ROWS[:1])
    assert read.mass.gt(0).any()
    config = model.config
    assert before == [c._attn_implementation for c in (config, config.text_config, config.vision_config)]


@pytest.mark.parametrize("model_type", ["falcon", "mamba2"])
def test_a_family_that_is_not_heard_is_refused(model_type):
    model = load(tiny_model(model_type), tokenizer=build_tokenizer())
    with pytest.raises(ValueError, match=f"No layer of this {model_type} attends through transformers' Attention"):
        span_attention(model, ROWS)


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("deepseek_v32", "Layer 0 of this deepseek_v32 gives its attention indices, which changes who attends to whom"),
        ("inkling_text", "Layer 0 of this inkling_text gives its attention position_bias, which changes who attends"),
        ("diffllama", "Layer 0 of this diffllama attends more than once in a pass: its heads cannot be told apart"),
    ],
)
def test_a_family_that_attends_otherwise_is_refused(model_type, sentence):
    model = load(tiny_model(model_type), tokenizer=build_tokenizer())
    former = model.config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        span_attention(model, ROWS)
    assert model.config._attn_implementation == former


def hear(model: PreTrainedModel, layer: int, query, key, mask, **words) -> None:
    """One call of a layer's attention, as in a pass."""
    session = interface._SESSIONS[model]
    session.layer, attention = layer, model.model.layers[layer].self_attn
    session.attend(interface.Attention(attention, query, key, key, mask, words))


def test_what_would_be_read_wrongly_is_refused():
    model, q = build("llama"), torch.randn(1, 4, 5, 8)
    k = q[:, :2]
    with attending(model, [Question(2, 5, 3, ((1,),))]):
        with pytest.raises(ValueError, match="Layer 1 of this llama gives its attention indices, which changes who"):
            hear(model, 1, q, k, None, indices=torch.ones(1))
        with pytest.raises(ValueError, match="Layer 1 of this llama attends from 5 queries to 4 keys in 1 rows, for 1"):
            hear(model, 1, q, k[:, :, :4], None)
        with pytest.raises(
            ValueError, match="attends to what comes later, too. Only causal attention is read and scaled"
        ):
            hear(model, 1, q, k, None, is_causal=False)
        hear(model, 1, q, k, None)
        with pytest.raises(ValueError, match="Layer 1 of this llama attends more than once in a pass"):
            hear(model, 1, q, k, None)


def test_a_mask_that_is_added_counts_as_one_of_yes_and_no():
    model, q = build("llama"), torch.randn(1, 4, 6, 8)
    seen = torch.ones(6, 6).tril().bool() & (torch.arange(6) != 2)
    added = torch.zeros(6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    answers = []
    for mask in (seen, added):
        with attending(model, [Question(3, 6, 4, ((1, 2), (2,)))]) as found:
            hear(model, 0, q, q[:, :2], mask[None, None])
        answers.append(found[0][0])
    torch.testing.assert_close(*answers)
    assert answers[0][:, 1].eq(0).all()


def test_each_row_is_read_under_its_own_mask():
    model, q = build("llama"), torch.randn(2, 4, 6, 8)
    masks = torch.ones(2, 1, 6, 6).tril().bool()
    masks[0, ..., 1], masks[1, ..., 2] = False, False
    with attending(model, [Question(3, 6, 4, ((1,), (2,)))] * 2) as found:
        hear(model, 0, q, q[:, :2], masks)
    for at, answer in enumerate(found[0]):
        assert answer[0, at].eq(0).all()
        assert answer[0, 1 - at].gt(0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"keys": ()}, r"The keys are \(\): give one position or more"),
        ({"keys": (2, 2)}, r"The keys are \(2, 2\): give one position or more, and each of them once."),
        ({"keys": (2, 9)}, "The key 9 is not in the prompt, whose 9 tokens are at 0 to 8."),
        ({"keys": (-1,)}, "The key -1 is not in the prompt"),
        ({"start": 8}, "An answer at 8 to 18 after a prompt of 9 tokens is not in a sequence of 19 tokens."),
        ({"stop": 20}, "An answer at 13 to 20 after a prompt of 9"),
        ({"start": 18}, "An answer at 18 to 18 after a prompt of 9"),
        ({"prompt": 0}, "An answer at 13 to 18 after a prompt of 0"),
    ],
)
def test_rows_that_ask_nothing_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(ROWS[0], **change)


def test_the_answer_of_a_completion_is_what_follows_its_thinking():
    model = load("organism")
    (completion,) = generate(model, ["a 3 b +4 c *7"])
    row = Attended.of(completion, [2])
    assert (row.prompt, row.start, row.stop) == (8, completion.span.end, len(completion.all_ids))
    assert decode(tokenizer_of(model), row.ids[row.start : row.stop], special=False) == completion.answer
    direct = replace(completion, span=None, thinking=None)
    assert Attended.of(direct, [2]).start == len(completion.prompt_ids)
    cut = replace(completion, ids=completion.ids[: completion.span.end - row.prompt])
    with pytest.raises(ValueError, match="Completion '0' has no answer after its thinking: it ends at 19 of 19 tokens"):
        Attended.of(cut, [2])


def test_a_filler_is_as_long_lies_in_the_prompt_and_is_no_key():
    seen = set()
    for seed in range(200):
        filler = filler_span((4, 5, 9), 16, seed=seed)
        assert filler == tuple(range(filler[0], filler[0] + 3))
        assert not {4, 5, 9} & set(filler)
        assert 0 < filler[0] <= 13
        assert filler == filler_span((4, 5, 9), 16, seed=seed)
        seen.add(filler[0])
    assert seen == {1, 6, 10, 11, 12, 13}
    assert filler_span((4, 5), 8, first=6) == (6, 7)
    with pytest.raises(ValueError, match="A prompt of 6 tokens has no stretch of 3 tokens beside the keys from posit"):
        filler_span((2, 3, 4), 6)


def test_a_text_is_located_by_its_tokens():
    model = load("organism")
    ids = encode_prompt(tokenizer_of(model), "a 3 b +4 c *7 b +4")
    assert locate(model, ids, "b +4") == locate(model, ids, " b +4") == (3, 4)
    assert locate(model, ids, "<bos>") == (0,)
    assert locate(model, ids, "+4 c *7 b") == (4, 5, 6, 7)
    for at in range(len(ids)):
        assert locate(model, ids, decode(tokenizer_of(model), ids[: at + 1])) == tuple(range(at + 1))
    for text in ("", "c +4"):
        with pytest.raises(
            ValueError, match=f"'{text.replace('+', '.')}' does not occur in the text of 10 tokens, '<bos"
        ):
            locate(model, ids, text)


def test_a_drop_is_taken_problem_by_problem():
    generator = torch.Generator().manual_seed(0)

    def some(layers: tuple[int, ...], steps: int) -> SpanAttention:
        mass = torch.rand(len(layers), 4, steps, generator=generator)
        return SpanAttention(layers, mass, mass, n_keys=3)

    base, cot = [some((0, 2), 3), some((0, 2), 5)], [some((0, 2), 7), some((0, 2), 2)]
    expected = torch.stack([b.mass.mean((1, 2)) / 3 - c.mass.mean((1, 2)) / 3 for b, c in zip(base, cot, strict=True)])
    torch.testing.assert_close(drop(base, cot), expected)
    torch.testing.assert_close(drop(cot, base), -expected)
    with pytest.raises(ValueError, match="A drop is taken problem by problem, but there are 2 base runs and 1 with"):
        drop(base, cot[:1])
    with pytest.raises(ValueError, match=r"A drop is taken layer by layer, but the layers differ: .*\(0, 3\)"):
        drop(base, [cot[0], some((0, 3), 2)])


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *made, 0)
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_reading_makes_no_map_of_all_pairs(family, monkeypatch):
    """benchmarks/attention.py measures the memory of a process."""
    monkeypatch.setattr(interface, "_FEWEST_SCORES", 1)
    model, n = build(family), 600
    model.config.sliding_window = 4096
    row = Attended(ids_of(n + 1, 7), keys=(2, 3, 4), prompt=100, start=101, stop=n + 1)
    with Largest() as read:
        span_attention(model, [row])
    with Largest() as eager:
        eager_weights(model, row)
    assert read.size < n * n / 2
    assert eager.size >= 4 * n * n
