"""A stream in whole letters is, joined, the answer; and the queue is fair."""

import random

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from probes import Sampling
from probes.model import find_delimiters
from probes.model.delimiters import Delimiters
from steer.engines.serving.reading import Plain, Reader, Turn, turn_of
from steer.engines.serving.tickets import Asked, Ended, Refused, Ticket
from steer.engines.serving.waiting import Waiting

PIECES = ("four", " is", "</", "think", "</thi", ">", "\n\n", " ", ".</", "é", "🙂", "日本", "<", "<think", "a.")


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, some of which merge: most letters beyond English are cut in two or more."""
    raw = Tokenizer(BPE())
    raw.decoder, raw.pre_tokenizer = decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["<think>\nfour is </think>\n\n.</think> x"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="<e>")
    made.chat_template = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}assistant:"
    return made


def streamed(tokenizer, delimiters, prompt, ids):
    reader = Reader(tokenizer, delimiters, prompt)
    early = [said for token in ids for said in reader.add(token)]
    turn = turn_of(tokenizer, prompt, ids, delimiters)
    late = list(reader.end(turn))
    joined = {
        name: "".join(text for own, text in early + late if own == name) for name in ("reasoning_content", "content")
    }
    assert not any("\ufffd" in text for _, text in early)
    assert joined == {"reasoning_content": turn.thinking or "", "content": turn.answer}
    return early, late


@pytest.mark.parametrize("opened", ["", "<think>", "<think>\n\n</think>\n"])
def test_joined_it_is_the_answer_whatever_tokens_are_cut(tokenizer, opened):
    delimiters, rng, told = find_delimiters(tokenizer, ("<think>", "</think>")), random.Random(0), 0
    prompt = tokenizer.encode(f"user: hi\nassistant:{opened}")
    for _ in range(60):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        text += rng.choice(("</think>", ".</think>\n\n", "")) + "".join(rng.choices(PIECES, k=rng.randint(0, 8)))
        text = text if opened or rng.random() < 0.2 else f"<think>{text}"
        early, _ = streamed(tokenizer, delimiters, prompt, tokenizer.encode(text))
        told += len(early)
    assert told > 120


def test_every_token_is_told_when_it_comes(tokenizer):
    delimiters = find_delimiters(tokenizer, ("<think>", "</think>"))
    ids = tokenizer.encode("<think>four is 🙂 x</think>\n\n日本 a")
    early, late = streamed(tokenizer, delimiters, tokenizer.encode("user: hi\nassistant:"), ids)
    assert "".join(text for _, text in early) == "four is 🙂 x日本 a"
    assert late == []
    assert [text for _, text in early] == ["four", " is", " 🙂", " x", "日", "本", " a"]


def test_without_delimiters_all_is_answer_and_a_plain_text_keeps_its_space(tokenizer):
    ids = tokenizer.encode(" \n four 🙂 <think> x \n")
    early, _ = streamed(tokenizer, Delimiters((), ()), [1], ids)
    assert {name for name, _ in early} == {"content"}
    plain, whole = Plain(tokenizer), Turn(None, tokenizer.decode(ids), 0)
    told = [text for token in ids for _, text in plain.add(token)] + [text for _, text in plain.end(whole)]
    assert "".join(told) == " \n four 🙂 <think> x \n"


def ticket(recipe=None, delivered=None, **sampling):
    asked = Asked((1,), Sampling(max_new_tokens=3, **sampling), recipe)
    return Ticket(asked, ([] if delivered is None else delivered).append)


def test_the_oldest_goes_first_and_nobody_joins_before_an_older_one_of_another_group():
    waiting, a, b, c, d, e = Waiting(), ticket("a"), ticket("b"), ticket("a"), ticket("a", seed=4), ticket("b")
    for one in (a, b, c, d, e):
        waiting.put(one)
    assert waiting.first(2) == [a, c]
    assert not waiting.could_join(a.group)
    assert waiting.joining(a.group, 8) == []
    assert waiting.first(8) == [b, e]
    assert waiting.could_join(a.group)
    assert waiting.joining(a.group, 8) == [d]
    warm, gone = ticket("a", temperature=1.0), ticket("b")
    assert warm.group != a.group
    gone.leave()
    waiting.put(gone)
    waiting.put(warm)
    assert waiting.first(8) == [warm]
    waiting.wake()
    assert waiting.first(8) == []
    waiting.put(b)
    assert waiting.close() == [b]
    with pytest.raises(Refused, match="The server is shutting down"):
        waiting.put(a)


def test_a_queue_has_an_end(monkeypatch):
    monkeypatch.setattr("steer.engines.serving.waiting.LONGEST", 2)
    waiting = Waiting()
    waiting.put(ticket())
    waiting.put(ticket())
    with pytest.raises(Refused, match="2 requests wait already") as refused:
        waiting.put(ticket())
    assert refused.value.status == 503


@pytest.mark.parametrize(("tokens", "how"), [((5, 2), "stop"), ((5, 6, 7), "length"), ((5, 6, 2), "stop")])
def test_a_row_ends_once(tokens, how):
    delivered = []
    one = ticket(delivered=delivered)
    for token in tokens:
        one.take(token, frozenset({2}))
    one.end(Refused("later"))
    assert delivered == [*tokens, Ended(how)]
