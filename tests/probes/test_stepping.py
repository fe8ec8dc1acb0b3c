"""One token a row, by tables: what the clock's rule for whole passes says, token by token."""

import random

import pytest
import torch

from probes.model import Delimiters, delimiters_of, load, tokenizer_of
from probes.rows import Rows
from probes.thinking import Clock
from probes.thinking.stepping import tables

WORDS = {
    "all": Delimiters(open=(3, 4), close=(5, 4), turn=(6, 7, 6), user=(6, 8), tool=(6, 9)),
    "no user": Delimiters(open=(3,), close=(4,), turn=(5, 5, 6)),
    "repeats": Delimiters(open=(3, 3, 3, 4), close=(3, 3, 5), turn=(6,), user=(7,)),
    "nothing": Delimiters(open=(), close=()),
    "one token for two": Delimiters(open=(3,), close=(3, 4), turn=(3, 4, 5), user=(3,)),
}
MARKERS = (((10,), (11, 11)), ((3, 10),))
ENDINGS = [((2,), 2), ((2, 12), 0), ((), None), ((4,), 4)]


class Whole(Clock):
    """The clock that reads each token as a pass of several."""

    def _over(self, *_):
        return None


def told(phases):
    names = ("phase", "thought", "position", "opens", "real")
    return [getattr(phases, name).tolist() for name in names], [x.tolist() for x in (*phases.marked, *phases.ended)]


def follow(one, other, prompt, steps, mask=None, rows=None):
    total = prompt.shape[1]
    assert told(one.advance(prompt, mask, 0, rows)) == told(other.advance(prompt, mask, 0, rows))
    for ids in steps:
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert told(one.advance(ids, mask, total, rows)) == told(other.advance(ids, mask, total, rows))
        total += ids.shape[1]


def drawn(rng, batch, steps):
    return [torch.tensor([[rng.randrange(14)] for _ in range(batch)]) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ends", "pad"), ENDINGS)
@pytest.mark.parametrize("words", WORDS)
def test_a_step_says_what_a_pass_says(words, ends, pad, seed):
    """Random tokens, of which most belong to a delimiter; prompts padded on the left; passes of several between."""
    rng = random.Random(f"{words} {ends} {seed}")
    markers = MARKERS if seed % 4 < 2 else ()
    clocks = [kind(WORDS[words], ends, pad, markers) for kind in (Clock, Whole)]
    prompt = torch.tensor([[rng.randrange(14) for _ in range(6)] for _ in range(5)])
    mask = torch.tensor([[int(i >= row) for i in range(6)] for row in range(5)])
    several = torch.tensor([[rng.randrange(14) for _ in range(3)] for _ in range(5)])
    steps = [*drawn(rng, 5, 30), several, *drawn(rng, 5, 20)]
    follow(*clocks, prompt, steps, mask if seed % 2 else None)


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_have_ended_are_told_alike(seed):
    rng = random.Random(seed)
    rows = Rows(object(), tuple(range(4)), (6, 5, 6, 4), ends=(2,))
    clocks = [kind(WORDS["all"], (2,), 0) for kind in (Clock, Whole)]
    prompt = torch.tensor([[rng.randrange(14) for _ in range(4)] for _ in range(4)])
    follow(*clocks, prompt, drawn(rng, 4, 60), rows=rows)


@pytest.mark.parametrize("seed", range(4))
def test_delimiters_of_letters_are_told_alike(seed):
    """`<think>` in a vocabulary that writes it in several tokens, and not always in the same."""
    model = load("reasoner")
    tokenizer, delimiters = tokenizer_of(model), delimiters_of(model)
    assert delimiters.open_text is not None
    rng = random.Random(seed)
    pieces = [
        "<think>",
        "</think>",
        " a",
        ".</think>\n\n",
        "<",
        "think",
        ">",
        "</",
        "<|im_end|>\n",
        "<|im_start|>user\n",
    ]
    pieces += ["<|im_start|>assistant\n", "Wait", "<|im_end|>", "é"]
    texts = ["".join(rng.choice(pieces) for _ in range(60)) for _ in range(3)]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows = torch.tensor([row[: min(map(len, ids))] for row in ids])
    markers = (tuple((token,) for token in tokenizer.encode("Wait", add_special_tokens=False)),)
    ends, pad = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    clocks = [kind(delimiters, ends, pad, markers) for kind in (Clock, Whole)]
    follow(*clocks, rows[:, :5], rows[:, 5:].split(1, 1))


def test_delimiters_of_the_same_tokens_have_tables_of_their_own():
    """Those that are found by letters compare equal to those that are not."""
    found = delimiters_of(load("reasoner"))
    plain = Delimiters(found.open, found.close, found.turn, found.user, found.tool)
    assert plain == found
    assert tables(plain, (), None, ()) is not tables(found, (), None, ())
    assert tables(found, (), None, ()) is tables(found, (), None, ())
