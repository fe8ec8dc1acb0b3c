"""Delimiters are found whatever their tokens merge with; channels, and the results of tools."""

import random

import pytest
import torch
from families import BASE, build, build_tokenizer
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from probes import Sampling, generate, load
from probes.generation._generate import _read
from probes.generation.engine import Row, Written
from probes.model import delimiters_of, encode_prompt, find_delimiters, tokenizer_of
from probes.needles import Needle
from probes.thinking import Clock, Rules, segments
from steer.decoding import Budget, BudgetForcing, CloseBias, Controlled, DecodingState

TEXTS = (
    "<think>\nfour\n</think>\n\n7",
    "So.</think> <b></think>.\n\n(</think>)\n",
    "a < b, </ th </thin k> ...</think>\n",
)
S = Sampling(max_new_tokens=40, temperature=0)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that, like Llama 3's, keeps newlines with the punctuation before them, and merges what it saw."""
    raw = Tokenizer(BPE())
    raw.decoder = decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(list(TEXTS) * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="<e>", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}assistant:"
    return tokenizer


@pytest.fixture(scope="module")
def model(merging):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **BASE | {"vocab_size": len(merging), "max_position_embeddings": 512})
    return load(AutoModelForCausalLM.from_config(config), tokenizer=merging, delimiters=("<think>", "</think>"))


def read(model, text, prompt="hi"):
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    written = Written(Row(0, "", 0, tuple(encode_prompt(tokenizer, prompt))), ids, ())
    return _read(model, written, S, "", {tokenizer.eos_token_id})


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\nfour\n</think>\n\n7", "four", "7"),
        ("<think>so.</think>.\n\nyes", "so.", ".\n\nyes"),
        ("<think>a < b, </ th </thin k> ...</think>\n", "a < b, </ th </thin k> ...", ""),
        ("<think>never", "never", ""),
        ("nothing </think> here", None, "nothing </think> here"),
    ],
)
def test_a_delimiter_is_found_by_its_text(model, text, thinking, answer):
    assert len(set(tokenizer_of(model).encode("</think>\n\n")) & set(delimiters_of(model).close)) < 3  # it does merge
    done = read(model, text)
    assert (done.thinking, done.answer) == (thinking, answer)


def test_the_clock_says_what_the_text_says(model):
    """Tokens up to the one that holds the last letter of the opening are prompt; from there thinking; and so on."""
    tokenizer = tokenizer_of(model)
    ids = encode_prompt(tokenizer, "hi") + tokenizer.encode(TEXTS[0], add_special_tokens=False)
    said = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    wanted = [2 if "</think>" in text else 1 if "<think>" in text else 0 for text in said]
    whole = Clock.of(model).advance(torch.tensor([ids]), None, 0).phase[0].tolist()
    assert whole == wanted
    clock, one_by_one = Clock.of(model), []
    for n, token in enumerate(ids):
        one_by_one += clock.advance(torch.tensor([[token]]), None, n).phase[0].tolist()
    assert one_by_one == wanted


def test_a_text_ends_where_its_letters_end_in_any_run_of_tokens(merging):
    """Law: against plain search in the letters, for 300 runs of tokens that a tokenizer would never write."""
    needle = Needle.of(merging, "</think>")
    rng = random.Random(0)
    near = [i for i, held in enumerate(needle.letters) if set(held) & set(b"</think>")]
    pieces = ["</", "th", "ink", ">", "</think", ">\n", "<", "/", "<</think>>"]
    planted = 0
    for _ in range(300):
        ids = [rng.choice(near) for _ in range(rng.randint(0, 6))]
        for piece in rng.choices(pieces, k=rng.randint(1, 6)):
            ids += merging.encode(piece, add_special_tokens=False)
        held, wanted = b"", []
        for i in ids:
            before = held.count(b"</think>")
            held += needle.letters[i]
            wanted.append(held.count(b"</think>") > before)
        planted += sum(wanted)
        assert needle.ends(torch.tensor([ids]))[0].tolist() == wanted
        partial = max((n for n in range(8) if held.endswith(b"</think>"[:n])), default=0)
        assert needle.partial(needle.ending(torch.tensor([ids]))).item() == partial
    assert planted > 50


def test_budgets_see_and_write_delimiters_that_merge(model):
    done = generate(model, ["hi"], sampling=S, decoding=Controlled(model, Budget(thinking=5)), prefill=opening(model))
    assert done[0].span.closed
    assert done[0].thinking_tokens <= 5 + len(delimiters_of(model).close)
    forced = Controlled(model, Budget(thinking=2, solution=3))
    assert generate(model, ["hi"], sampling=S, decoding=forced, prefill=opening(model))[0].stop == "length"


def opening(model):
    return tokenizer_of(model).encode("<think>", add_special_tokens=False)


@pytest.mark.parametrize("control", [CloseBias(-torch.inf), BudgetForcing(1, "four")])
def test_every_token_that_would_close_is_held_back(model, control):
    """After `so` the tokens that begin to close are `</`, `.</`, `></` and others; after `so<` those that begin with a
    slash; after `.</` `think` no bias is left, but `never` holds back `>`, `>\n`, `>\n\n` and others."""
    tokenizer, d = tokenizer_of(model), delimiters_of(model)
    opened = tokenizer.encode("<think>so", add_special_tokens=False)
    for more, completes in (([], False), (tokenizer.encode("<"), False), (tokenizer.encode(".</think>")[:-1], True)):
        text = [*opened, *more]
        state = DecodingState(d, [tokenizer.eos_token_id], torch.ones(1, 1, dtype=torch.long))
        for n in range(1, len(text) + 1):
            state.follow(torch.tensor([text])[:, :n])
        assert state.thinking.item()
        told = [tokenizer.decode([*text, i]) for i in range(len(tokenizer))]
        ways = ["</think>"[:n] for n in range(2, 8)]
        begun = {i for i, words in enumerate(told) if not completes and words.endswith((*ways, "</think>"))}
        closing = {i for i, words in enumerate(told) if "</think>" in words}
        assert len(begun | closing) > 1
        at = torch.tensor([True])
        added = state.closing_added(torch.zeros(1, len(tokenizer)), at, 1.0)[0]
        assert set(added.nonzero().flatten().tolist()) == begun
        never = state.closing_added(torch.zeros(1, len(tokenizer)), at, -torch.inf)[0]
        assert set(never.isinf().nonzero().flatten().tolist()) == begun | closing
        if begun:
            drawn = torch.zeros(1, len(tokenizer)).index_fill(1, torch.tensor([min(begun)]), 1.0)
            assert state.would_close(drawn).item()
        assert control.processors(model, state)


def test_segments_lie_between_delimiters_that_merge(model):
    done = read(model, "<think>one.\n\ntwo.</think>\n\n7")
    ids, parts = done.all_ids, segments(model, done, Rules("steps", after=("\n\n",)))
    assert [tokenizer_of(model).decode(ids[part.start : part.stop]) for part in parts] == ["one.\n\n", "two"]


def test_the_answer_of_a_channel_has_no_header():
    special = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
    words = ("<pad>", "<bos>", "<eos>", *special, "analysis", "final", "assistant", "commentary", "B")
    template = (
        "{% for m in messages %}<|start|> {{m.role}} <|message|> {{m.content}} <|end|> {% endfor %}<|start|> assistant"
    )
    tokenizer = build_tokenizer(words, template)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.backend_tokenizer.decoder = Fuse()
    m = load(build("gpt_oss"), tokenizer=tokenizer, delimiters=("<|channel|> analysis <|message|>", "<|end|>"))
    thought = "<|channel|> analysis <|message|> w30 <|end|> <|start|> assistant "
    final, remark = (
        "<|channel|> final <|message|> B",
        "<|channel|> commentary <|message|> w31 <|end|> <|start|> assistant ",
    )

    def answer(said):
        row = Row(0, "0", 0, tuple(encode_prompt(tokenizer, "w20")))
        return _read(m, Written(row, tokenizer.encode(said), ()), S, "", {2}).answer

    assert answer(thought + final + " <eos>") == "B"
    assert answer(thought + remark + final) == "B"
    assert answer(final + " <eos>") == "B"
    assert answer(thought + "<|channel|> final") == ""  # cut within the header
    assert answer("w20 w21") == "w20w21"


def test_what_stands_before_the_models_new_turn_is_prompt():
    words = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<user>", "<assistant>", "<tool>")
    template = "{% for m in messages %}<{{m.role}}> {{m.content}} {% endfor %}<assistant>"
    tokenizer = build_tokenizer(words, template)
    m = load(build("llama"), tokenizer=tokenizer)
    assert delimiters_of(m).tool == tuple(tokenizer.encode("<tool>"))
    turns = [
        {"role": "user", "content": "w20"},
        {"role": "assistant", "content": "<think> w30 </think> w32"},
        {"role": "tool", "content": "w40"},
    ]
    ids = encode_prompt(tokenizer, turns) + tokenizer.encode("<think> w50")
    phases = Clock.of(m).advance(torch.tensor([ids]), None, 0)
    assert phases.phase.tolist() == [[0] * 10 + [1, 1]]
    assert phases.thought.tolist() == [[-1] * 10 + [0, 1]]
    clock, told = Clock.of(m), []
    for n, token in enumerate(ids):
        told.append(clock.advance(torch.tensor([[token]]), None, n).phase.item())
    assert told[-2:] == [1, 1]


def test_a_delimiter_of_its_own_tokens_needs_no_search():
    organism = load("organism")
    d = delimiters_of(organism)
    assert (d.open_text, d.close_text) == (None, None)
    assert find_delimiters(tokenizer_of(organism), ("Okay", "So")).open_text is None
