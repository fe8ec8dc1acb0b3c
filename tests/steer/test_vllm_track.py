"""The vLLM plugin tells phases as the clock does: on random tokens, cut anywhere, taken up again, by slots or not."""

import random

import numpy as np
import plugin  # noqa: F401 - the plugin's package becomes importable
import pytest
import torch
from thinksteer_vllm.machine import Delimiters as Words
from thinksteer_vllm.machine import Letters, Machine, Track
from thinksteer_vllm.slots import Slots

from probes.model import Delimiters, delimiters_of, load, tokenizer_of
from probes.thinking import Clock

DRAWS, ROWS, SEEDS = 1000, 5, 5


def drawn(rng):
    """Delimiters whose last tokens differ, as those of templates do; markers; rows; and how much of them is prompt."""
    k = rng.choice([4, 5, 7])

    def ids(longest):
        return tuple(rng.randrange(k) for _ in range(rng.randint(1, longest)))

    while True:
        words = [ids(3), ids(3), ids(3), *((ids(2) if rng.random() < p else ()) for p in (0.7, 0.4))]
        given = [own[-1] for own in words if own]
        if len(set(given)) == len(given):
            break
    markers = tuple(tuple(ids(2) for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(0, 2)))
    length = rng.randint(3, 40)
    rows = [[rng.randrange(k) for _ in range(length)] for _ in range(ROWS)]
    return words, markers, rows, rng.randint(1, length)


def by_clock(words, markers, rows, n_prompt):
    """As Hugging Face calls it: the prompt in one pass, then a token at a time. [rows columns tokens]"""
    clock, ids, told = Clock(Delimiters(*words), markers=markers), torch.tensor(rows), []
    for start, stop in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, ids.shape[1]))]:
        now = clock.advance(ids[:, start:stop], None, start)
        told.append(torch.stack([now.phase, now.thought, *now.marked], dim=1))
    return torch.cat(told, dim=2)


def by_plugin(rng, machine, rows, n_prompt):
    """The prompts in chunks, the rest by slots; now and then a row's state is lost, and read again from somewhere."""
    n, length = len(rows), len(rows[0])
    slots, own = Slots.of(machine, n + 2, torch.device("cpu")), rng.sample(range(n + 2), n)
    tracks, at, told = [None] * n, [0] * n, torch.full((n, 2 + len(machine.ways), length), -9)
    sits = [False] * n
    while min(at) < length:
        steps = [i for i in range(n) if sits[i] and n_prompt <= at[i] < length]
        if steps:
            ids = torch.tensor([rows[i][at[i]] for i in steps])
            phase, thought, marked = slots.step(torch.tensor([own[i] for i in steps]), ids)
            for j, i in enumerate(steps):
                told[i, :, at[i]] = torch.cat([phase[j, None], thought[j, None], marked[:, j]])
                at[i] += 1
        for i in set(range(n)) - set(steps):
            if at[i] == length:
                continue
            end = min(length if at[i] >= n_prompt else n_prompt, at[i] + rng.randint(1, 9))
            if tracks[i] is None or tracks[i].seen != at[i]:
                tracks[i] = Track.of(machine, rows[i][:n_prompt])
                tracks[i].read(rows[i][: at[i]])
            now = tracks[i].read(np.array(rows[i][at[i] : end]))
            told[i, :, at[i] : end] = torch.from_numpy(np.stack([now.phase, now.thought, *now.marked]))
            slots.put([own[i]], [tracks[i].state])
            at[i], sits[i] = end, True
        for i in range(n):
            if at[i] < length and rng.random() < 0.05:
                tracks[i], sits[i], at[i] = None, False, rng.randint(0, at[i])
    return told


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_row_is_told_as_the_clock_tells_it_however_it_is_cut(seed):
    rng = random.Random(seed)
    for _ in range(DRAWS // SEEDS):
        words, markers, rows, n_prompt = drawn(rng)
        told = by_plugin(rng, Machine.of(Words(*words), markers), rows, n_prompt)
        assert torch.equal(told, by_clock(words, markers, rows, n_prompt)), (words, markers, rows, n_prompt)


def test_many_rows_step_side_by_side():
    rng = random.Random(3)
    words, markers, _, _ = drawn(rng)
    machine = Machine.of(Words(*words), markers)
    rows = [[rng.randrange(7) for _ in range(30)] for _ in range(4)]
    slots, tracks = Slots.of(machine, 4, torch.device("cpu")), [Track(machine) for _ in rows]
    for at in range(30):
        ids = torch.tensor([row[at] for row in rows])
        phase, thought, marked = slots.step(torch.arange(4), ids)
        for i, track in enumerate(tracks):
            now = track.read([rows[i][at]])
            assert [int(phase[i]), int(thought[i])] == [int(now.phase[0]), int(now.thought[0])]
            assert marked[:, i].tolist() == now.marked[:, 0].tolist()
            assert slots.state[i].tolist() == track.state


def test_a_header_in_the_users_words_is_prompt_and_so_is_all_before_the_last_one():
    machine = Machine.of(Words(open=(3,), close=(4,), turn=(5,), user=(1,)))
    prompt = [1, 3, 7, 5, 3, 8, 4, 9, 1, 3, 7, 5]  # a first turn that thought, and words of the user's like a tag
    track = Track.of(machine, prompt)
    assert track.turn_at == 11
    assert track.read(prompt).phase.tolist() == [0] * 12
    assert track.read([3, 7, 4, 9]).phase.tolist() == [1, 1, 2, 2]
    assert Track(machine).read(prompt).phase.tolist() != [0] * 12  # so a rule that knows no end of the prompt errs


def test_delimiters_of_letters_are_told_as_the_clock_tells_them():
    """`<think>` in a vocabulary that writes it in several tokens, and not always in the same."""
    from steer.engines.vllm.settings import delimiters_in_words

    model = load("reasoner")
    tokenizer, delimiters = tokenizer_of(model), delimiters_of(model)
    assert delimiters.open_text is not None
    words = delimiters_in_words(delimiters)
    patterns = {
        name: Letters({int(t): tuple(move) for t, move in own.items()}) if isinstance(own, dict) else tuple(own)
        for name, own in words.items()
    }
    machine, rng = Machine.of(Words(**patterns)), random.Random(0)
    parts = ["<think>", "</think>", ".</think>\n\n", "<", "think", ">", " a", "</", "\n"]
    header = list(delimiters.turn)
    for _ in range(40):
        text = "".join(rng.choice(parts) for _ in range(12))
        ids = header + tokenizer.encode(text, add_special_tokens=False)
        now = Clock(delimiters).advance(torch.tensor([ids]), None, 0)
        told = Track.of(machine, ids).read(ids)
        assert told.phase.tolist() == now.phase[0].tolist()
        assert told.thought.tolist() == now.thought[0].tolist()
