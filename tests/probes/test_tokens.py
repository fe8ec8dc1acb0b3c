"""From words to ids: which delimiters a tokenizer has, where the thinking is, and which markers exist."""

import random

import pytest
from families import SPECIAL, build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probes.model.delimiters import Delimiters, ThinkingSpan, find_delimiters, thinking_span
from probes.model.loading import load, markers_of, tokenizer_of
from probes.model.tokens import REFLECTION_MARKERS, decode, encode_prompt, present_markers

ONE = Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,))
SEVERAL = Delimiters(open=(31, 32), close=(33, 34, 35), turn=(36, 37))
PLAIN = ("<pad>", "<bos>", "<eos>", "?")  # a vocabulary that does not think
NO_THINKING_TEMPLATE = "{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}?"


def bytes_tokenizer():
    """One token a byte, as in byte-level BPE: a space before a word is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_prompt_is_written_by_the_chat_template_up_to_where_the_model_speaks():
    tokenizer = build_tokenizer()
    assert encode_prompt(tokenizer, "w7 w8") == [1, 7, 8, 5]
    assert encode_prompt(tokenizer, [{"role": "user", "content": "w7 w8"}]) == [1, 7, 8, 5]
    assert encode_prompt(tokenizer, "w7", template={"open_thinking": True}) == [1, 7, 5, 3]
    assert encode_prompt(tokenizer, "w7", template={"enable_thinking": False}) == [1, 7, 5, 3, 4]
    talk = [("user", "w7"), ("assistant", "<think> w9 </think> w10"), ("user", "w8")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert encode_prompt(tokenizer, messages) == [1, 7, 5, 3, 9, 4, 10, 2, 1, 8, 5]


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template, so a prompt cannot be written"):
        encode_prompt(build_tokenizer(template=None), "w7")


def test_delimiters_are_found_in_the_vocabulary_with_the_header_of_the_turn():
    assert find_delimiters(build_tokenizer()) == ONE
    assert find_delimiters(tokenizer_of(load("organism"))) == ONE


def test_the_header_ends_every_prompt_whatever_was_asked():
    for tokenizer in (build_tokenizer(), tokenizer_of(load("organism"))):
        turn = find_delimiters(tokenizer).turn
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        prompts = [encode_prompt(tokenizer, word) for word in words]
        assert all(tuple(prompt[-len(turn) :]) == turn for prompt in prompts)


@pytest.mark.parametrize("pair", [("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>")])
def test_each_published_pair_is_found_in_the_vocabulary_or_in_the_template_alone(pair):
    tokenizer = build_tokenizer((*PLAIN, *pair), NO_THINKING_TEMPLATE)
    found = find_delimiters(tokenizer)
    assert (found.open, found.close) == ((4,), (5,))
    spelled = bytes_tokenizer()
    spelled.chat_template = "{{ messages[0]['content'] }}:" + f"{{% if false %}}{pair[0]}{{% endif %}}"
    expected = (tuple(spelled.encode(text)) for text in (*pair, ":"))
    assert find_delimiters(spelled) == Delimiters(*expected)


def test_a_header_stops_before_an_opening_tag_that_the_template_always_writes():
    tokenizer = build_tokenizer(template="<bos> {{ messages[0]['content'] }} w9 ? <think>")
    assert find_delimiters(tokenizer, ("<think>", "</think>")).turn == (9, 5)


def test_delimiters_given_as_words_or_as_ids_are_taken_at_their_word():
    tokenizer = build_tokenizer()
    given = find_delimiters(tokenizer, ("w7 w8", "w9 w10 w11"))
    assert (given.open, given.close) == ((7, 8), (9, 10, 11))
    assert find_delimiters(tokenizer, SEVERAL) is SEVERAL
    assert find_delimiters(build_tokenizer(template=None)) == Delimiters((3,), (4,), ())
    with pytest.raises(ValueError, match=r"turns the delimiters \('', '</think>'\) into no tokens"):
        find_delimiters(tokenizer, ("", "</think>"))


def test_a_tokenizer_that_does_not_think_is_refused():
    tokenizer = build_tokenizer(PLAIN, NO_THINKING_TEMPLATE)
    with pytest.raises(ValueError, match="looked for <think>, .*Is it a reasoning model.*delimiters="):
        find_delimiters(tokenizer)


def spans(d):
    """Prompt, completion, and the span: start, last token of the opening tag, end, and if it closed."""
    asked, thought = [1, 20, *d.turn], [*d.open, 21, 22, *d.close]
    opened, off = [*asked, *d.open], [*asked, *d.open, *d.close]
    earlier = [*asked, *thought, 23, 2, *asked]
    n, o, c, m = len(asked), len(d.open), len(d.close), len(earlier)
    return [
        (asked, [*thought, 23], (n, n + o - 1, n + o + 2 + c, True)),
        (asked, [24, *thought, 23], (n + 1, n + o, n + o + 3 + c, True)),
        (asked, [*d.open, 21], (n, n + o - 1, n + o + 1, False)),  # truncated
        (opened, [21, *d.close, 23], (n + o, n + o - 1, n + o + 1 + c, True)),
        (opened, [21, 22], (n + o, n + o - 1, n + o + 2, False)),
        (opened, [], (n + o, n + o - 1, n + o, False)),
        (earlier, thought, (m, m + o - 1, m + o + 2 + c, True)),
        ([*earlier, *d.open], [21, *d.close], (m + o, m + o - 1, m + o + 1 + c, True)),
        (off, [23], None),
        (asked, [23, 24], None),
        (asked, [], None),
        (earlier, [23], None),
    ]


@pytest.mark.parametrize("turn", ["turn", "no turn"])
@pytest.mark.parametrize("d", [ONE, SEVERAL], ids=["one token", "several tokens"])
def test_the_thinking_of_the_current_turn_is_found(d, turn):
    known = d if turn == "turn" else Delimiters(d.open, d.close)
    for prompt, completion, expected in spans(d):
        span = None if expected is None else ThinkingSpan(*expected)
        assert thinking_span(prompt, completion, known) == span, (prompt, completion)


@pytest.mark.parametrize("d", [ONE, SEVERAL], ids=["one token", "several tokens"])
def test_the_span_begins_at_the_opening_tag_that_the_model_wrote_and_ends_after_the_closing_one(d):
    rng = random.Random(0)
    for _ in range(200):
        before, inside, after = (rng.choices(range(50, 60), k=rng.randint(0, 4)) for _ in range(3))
        prompt, completion = [1, 20, *d.turn], [*before, *d.open, *inside, *d.close, *after]
        span = thinking_span(prompt, completion, d)
        whole = [*prompt, *completion]
        assert whole[span.start : span.end] == [*d.open, *inside, *d.close]
        assert whole[span.first + 1 : span.end - len(d.close)] == inside
        assert whole[span.end :] == after


def test_the_markers_of_the_organism_are_present_and_the_others_are_named():
    model = load("organism")
    tokenizer = tokenizer_of(model)
    found, lacking = present_markers(tokenizer)
    assert found == {word: [(tokenizer.get_vocab()[word],)] for word in ("Wait", "Hmm")}
    assert lacking == ("Alternatively", "But", "\n\n")
    assert present_markers(tokenizer, markers_of(model))[1] == ()


def test_a_marker_is_found_with_and_without_a_space_where_the_ids_differ():
    tokenizer = bytes_tokenizer()
    found, lacking = present_markers(tokenizer)
    assert (list(found), lacking) == (list(REFLECTION_MARKERS), ())
    for marker, ways in found.items():
        assert {decode(tokenizer, ids) for ids in ways} == {marker, " " + marker}


def test_special_tokens_are_decoded_on_demand():
    tokenizer = build_tokenizer()
    assert decode(tokenizer, [1, 7, 2]) == "<bos> w7 <eos>"
    assert decode(tokenizer, [1, 7, 2], special=False) == "w7"
    assert [decode(tokenizer, [i]) for i in range(len(SPECIAL))] == list(SPECIAL)
