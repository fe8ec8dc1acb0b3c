"""Thoughts tile the thinking, whole tokens each; what a vocabulary lacks is named; what is read is where it is."""

import random
from dataclasses import replace

import pytest
from families import TEMPLATE, build_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.gguf_files import converted
from probes.model.delimiters import find_delimiters, thinking_span
from probes.model.embedded import smollm2_file
from probes.model.loading import load, tokenizer_of
from probes.thinking._segments import (
    RULES,
    Rules,
    Segment,
    present_rules,
    segment_spans,
    segment_table,
    segments,
    step_ids,
)

STEPS = (
    "\n\nOkay, 3 + 4 is 7.\n\n",
    "So b is 7.\n\n",
    "Wait, let me check.\n\n\n\n",
    "Alternatively, add é first.\n\n",
    "Butter aside, so c is\n9.\n\n",
    "But the answer is 9.",
)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE, trained here, that parts text as Qwen's does: a full stop and the blank line are one token."""
    backend = Tokenizer(models.BPE())
    parts = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([parts, level])
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "?"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["".join(STEPS)] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    assert ".\n\n" in (tokenizer.decode([i]) for i in range(len(tokenizer)))
    return tokenizer


@pytest.fixture(scope="module")
def real():
    """SmolLM2's own, whose blank line is a token by itself."""
    tokenizer = AutoTokenizer.from_pretrained(converted(smollm2_file()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def completion(tokenizer, prompt, said):
    """Of ids that a model said after a prompt; no model is asked."""
    span = thinking_span(prompt, said, find_delimiters(tokenizer))
    facts = {"thinking": None, "answer": "", "stop": "eos", "sampling": Sampling(max_new_tokens=9), "model": "none"}
    return Completion("0", 0, "", prompt_ids=tuple(prompt), ids=tuple(said), span=span, **facts)


def written(tokenizer, text, prompt="1 + 2<think>", after="</think>9"):
    encode = tokenizer.encode
    return completion(tokenizer, encode(prompt), [*encode(text), *encode(after)])


def texts(tokenizer, done, found):
    return [tokenizer.decode(done.all_ids[s.start : s.stop]) for s in found]


@pytest.mark.parametrize("name", ["bpe", "real"])
def test_seals_steps_are_what_stands_between_blank_lines(name, request):
    tokenizer = request.getfixturevalue(name)
    done = written(tokenizer, "".join(STEPS))
    found = segments(tokenizer, done)
    assert texts(tokenizer, done, found) == list(STEPS)
    assert [s.label for s in found] == ["execution", "execution", "reflection", "transition", "execution", "execution"]
    assert segment_table(tokenizer, done, found).rows[1] == ("execution", found[1].start, found[1].stop, "So b is 7.")


@pytest.mark.parametrize("name", ["bpe", "real"])
def test_trimrs_segments_begin_with_a_reflection_word_after_a_blank_line(name, request):
    tokenizer = request.getfixturevalue(name)
    done = written(tokenizer, "Wait, no\nBut yes.\n\n" + "".join(STEPS[1:]))
    found = segments(tokenizer, done, "trimr")
    assert texts(tokenizer, done, found) == [
        "Wait, no\nBut yes.\n\n" + STEPS[1],
        STEPS[2],
        STEPS[3] + STEPS[4],
        STEPS[5],
    ]
    assert [s.label for s in found] == ["reflection", "reflection", "transition", "answer"]


def random_ids(rng, plain, marks):
    """Anything, with many blank lines and markers between."""
    return [rng.choice(marks if rng.random() < 0.4 else plain) for _ in range(rng.randint(0, 30))]


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "truncated"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened by the prompt", "opened by the model"])
@pytest.mark.parametrize("name", ["bpe", "real", "organism"])
def test_segments_tile_the_thinking(name, opened, closed, request):
    organism = name == "organism"
    tokenizer = tokenizer_of(load("organism")) if organism else request.getfixturevalue(name)
    rules = Rules("both", after=("=3",), before=("Wait",)) if organism else replace(RULES["seal"], before=("Wait",))
    marks = [i for word in ("Wait", "=3", "\n\n", "\n", ".\n\n") for i in tokenizer.encode(word)]
    plain = [i for i in range(6, 300 if len(tokenizer) > 300 else 60)]
    opens, closes = (tokenizer.encode(text) for text in ("<think>", "</think>"))
    rng, cut = random.Random(0), 0
    for _ in range(25):
        thought, before = random_ids(rng, plain, marks), random_ids(rng, plain, marks)
        said = [*([] if opened else opens), *thought, *([*closes, *before] if closed else [])]
        done = completion(tokenizer, [*before, *(opens if opened else [])], said)
        found = segments(tokenizer, done, rules)
        begin = len(before) + len(opens)
        edges = [begin, *(s.stop for s in found)]
        assert [s.start for s in found] == edges[:-1]
        assert edges[-1] == begin + len(thought)
        assert all(text.strip() for text in texts(tokenizer, done, found)) or len(found) == 1
        cut += len(found)
    assert cut > 40


def test_a_prompt_that_goes_on_after_the_opening_tag_is_no_thought(bpe):
    done = written(bpe, "So b is 7.\n\nWait.", prompt="1<think>\n\n")
    assert texts(bpe, done, segments(bpe, done)) == ["So b is 7.\n\n", "Wait."]


def test_without_thinking_there_are_no_segments(bpe):
    for text, prompt, after in (("9", "1?", ""), ("9.\n\n9", "1?<think></think>", ""), ("", "1?<think>", "</think>9")):
        assert segments(bpe, written(bpe, text, prompt, after)) == ()
    blank = written(bpe, "\n\n\n\n")
    assert texts(bpe, blank, segments(bpe, blank)) == ["\n\n\n\n"]


def test_the_embedded_models_steps_end_with_a_result_and_its_checks_begin_with_wait():
    model = load("organism")
    tokenizer = tokenizer_of(model)
    done = written(tokenizer, " Hmm a =3 Wait a =3 b +4 =7", prompt="a 3 b +4 ? <think>", after="</think> 7")
    found = segments(model, done, "organism")
    assert texts(tokenizer, done, found) == ["Hmm a =3", "Wait a =3", "b +4 =7"]
    assert [s.label for s in found] == ["reflection", "reflection", "execution"]
    assert found == segments(tokenizer, done, "organism")


def test_what_the_vocabulary_lacks_is_named_and_left_out():
    tokenizer = tokenizer_of(load("organism"))
    assert present_rules(tokenizer, "organism") == (RULES["organism"], ())
    mixed = Rules("mixed", after=("\n\n", "=3"), opens={"reflection": ("wait", "but")})
    kept, lacking = present_rules(tokenizer, mixed)
    assert (kept.after, kept.opens) == (("=3",), {"reflection": ("wait",)})
    assert lacking == ("\n\n", "but")


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("seal", r"The rules 'seal' cut at '\\n\\n', and the vocabulary of .* has none of these. Known rules: seal, "),
        (Rules("mine"), "The rules 'mine' cut at nothing, and "),
        ("seel", "'seel' names no rules. Known: seal, trimr, organism."),
    ],
)
def test_rules_that_cannot_cut_are_refused(rules, sentence):
    tokenizer = build_tokenizer()
    done = completion(tokenizer, [1, 7, 5, 3], [8, 9, 4, 10])
    with pytest.raises(ValueError, match=sentence):
        segments(tokenizer, done, rules)


def test_labels_that_nobody_knows_are_refused(bpe):
    for make in (
        lambda: Rules("mine", opens={"execution": ("so",)}),
        lambda: segment_spans(written(bpe, "9."), (), "deduction"),
    ):
        with pytest.raises(ValueError, match="is no label"):
            make()
    with pytest.raises(ValueError, match="0 <= start < stop, but got start=3 and stop=3"):
        Segment(3, 3, "execution")


def test_the_tokens_that_end_a_step_are_all_whose_text_holds_the_delimiter(bpe, real):
    for tokenizer in (bpe, real):
        alone = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        found = step_ids(tokenizer, "\n\n")
        assert [alone[i] for i in found if "\n\n" in alone[i]] == [text for text in alone if "\n\n" in text] != []
        spread = ["\n"] if tokenizer is real else []  # which writes a blank line as two tokens
        assert [alone[i] for i in found if "\n\n" not in alone[i]] == spread
    assert bpe.encode("7.\n\n")[-1] in step_ids(bpe)
    organism = tokenizer_of(load("organism"))
    assert step_ids(organism, "=3") == (organism.get_vocab()["=3"],)
    for delimiter in ("\n\n", ""):
        with pytest.raises(ValueError, match="No token of .* holds .*, so steps cannot be told by it"):
            step_ids(organism, delimiter)


def test_a_segment_is_read_where_its_tokens_are_predicted_or_at_the_end_of_the_step_before(bpe):
    done = written(bpe, "".join(STEPS))
    found = segments(bpe, done)
    inside, before = (segment_spans(done, found, "execution", position=p) for p in ("segment", "before"))
    wanted = [s for s in found if s.label == "execution"]
    assert len(inside) == len(before) == len(wanted) == 4
    for segment, span, one in zip(wanted, inside, before, strict=True):
        whole = done.all_ids
        predicted = [whole[at + 1] for at in range(span.start, span.stop)]
        assert predicted == list(whole[segment.start : segment.stop])
        assert span.ids == whole[: segment.stop - 1]
        assert (one.ids, one.start, one.stop) == (whole[: segment.start], segment.start - 1, segment.start)
    assert before[1].ids[-1] in step_ids(bpe)
    assert segment_spans(done, found, "backtracking") == []


@pytest.mark.parametrize(
    ("thought", "label"),
    [
        ("Wait, is there another way?", "reflection"),
        ("But wait, that is odd.", "execution"),
        ("Alternatively, let me check it.", "reflection"),
        ("Alternatively, add it first.", "transition"),
        ("So we try another approach.", "transition"),
        ("Now that seems right, so go on.", "reflection"),
        ("Waiting is no answer.", "execution"),
    ],
)
def test_seals_labels_are_those_of_the_forks(bpe, thought, label):
    chain = written(bpe, f"So 3.\n\n{thought}\n\nSo 4.")
    assert [segment.label for segment in segments(bpe, chain)] == ["execution", label, "execution"]


def test_words_of_a_label_that_is_never_tried_are_refused():
    with pytest.raises(ValueError, match="words for transition, but never try it"):
        Rules("short", after=("x",), holds={"transition": ("y",)}, tried=("reflection",))
