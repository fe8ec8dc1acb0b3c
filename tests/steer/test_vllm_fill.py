"""Both runners of vLLM, played by hand: whatever their schedule, each token gets the rows that the gates say.

The second runner itself was never run, for want of a GPU: this is its protocol, with batches as it makes them.
"""

import random
from types import SimpleNamespace as Named

import numpy as np
import plugin  # noqa: F401 - the plugin's package becomes importable
import pytest
import torch
from families import build
from thinksteer_vllm.engine.runners import fill_first, second_class
from thinksteer_vllm.machine import Delimiters as Words
from thinksteer_vllm.recipes import read_recipe
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.settings import ADMITTED, Settings
from thinksteer_vllm.steering import Steering

from probes import Site
from probes.model import Delimiters
from probes.thinking import Clock
from steer import Add, Recipe, Schedule, Scope, Step
from steer.runtime.gates import Gate

IDS = {"open": (3,), "close": (4, 8), "turn": (5, 6), "user": (1,)}
SCOPES = {
    "one": [Scope("thinking", after=1, markers=((9,),)), Scope("all", tokens=(7, 9)), Scope("answer")],
    "two": [Scope("thinking", window=(1, 5), schedule=Schedule("linear", start=1.0, end=0.0, over=6))],
    "three": [Scope("prompt"), Scope("thinking")],
}
LIMIT, SEATS, LONGEST = 12, 3, 30


@pytest.fixture
def settings(tmp_path):
    model, recipes = build("llama"), {}
    for name, scopes in SCOPES.items():
        steps = tuple(Step(Add(Site(1, "resid_post"), torch.ones(32)), scope) for scope in scopes)
        Recipe(steps, Recipe.of(model, []).model).save(tmp_path / name)
        recipes[name] = read_recipe(name, tmp_path / name, "")
    return Settings(recipes, Words(**IDS))


def steering_of(settings):
    widths = {"stream": 32, "z": 32, "head": 8}
    device = torch.device("cpu")
    return Steering(
        settings, widths, dtype=torch.float32, device=device, n_tokens=LIMIT + 4, n_requests=SEATS
    )  # fmt: skip


def expected(settings, name, ids, n_prompt):
    """Of each token, row and multiple by step, as `applied` would have it."""
    recipe = settings.recipes[name]
    first = 1 + sum(len(own.steps) for own in list(settings.recipes.values())[: list(settings.recipes).index(name)])
    clock = Clock(Delimiters(**IDS), markers=tuple(settings.markers))
    rows, multiples = (torch.zeros(len(recipe.steps), len(ids)) for _ in range(2))
    for a, b in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, len(ids)))]:
        now = clock.advance(torch.tensor([ids[a:b]]), None, a)
        for k, scope in enumerate(SCOPES[name]):
            gate = Gate(scope, clock.markers)
            gate.begin(now, torch.tensor([ids[a:b]]))
            rows[k, a:b] = gate.mask[0] * (first + k)
            multiples[k, a:b] = 1.0 if gate.multiple is None else gate.multiple[0]
    return rows, multiples


class Play:
    """Requests, a scheduler that cuts, puts off and takes up again, and what each token was given."""

    def __init__(self, settings, seed, waiting):
        self.rng, self.steering = random.Random(seed), steering_of(settings)
        self.all = {}
        for i in range(7):
            ids = [self.rng.choice([1, 3, 4, 5, 6, 7, 8, 9, 10]) for _ in range(self.rng.randint(4, LONGEST))]
            name = self.rng.choice([None, *SCOPES])
            self.all[f"r{i}"] = Named(name=name, ids=ids, n_prompt=self.rng.randint(1, len(ids)), at=0)
        self.settings, self.living, self.most = settings, {}, SEATS + waiting

    def schedule(self):
        """[(request, begin, count)]; those that are put off begin again, at 0 or at what a cache holds."""
        rng, left = self.rng, LIMIT
        for own in self.living.values():
            if rng.random() < 0.08:
                own.at = rng.randint(0, own.at)
        for key, own in self.all.items():
            if len(self.living) < self.most and key not in self.living and own.at < len(own.ids):
                self.living[key] = own
        batch = []
        for key in rng.sample(list(self.living), min(SEATS, len(self.living))):
            own = self.living[key]
            known = own.n_prompt if own.at < own.n_prompt else own.at + 1
            count = min(left, known - own.at, rng.randint(1, 8))
            if count:
                batch.append((key, own.at, count))
                left -= count
        return batch

    def check(self, batch, seen):
        tokens, at = self.steering.tokens, 0
        for key, begin, count in batch:
            own = self.all[key]
            rows, multiples = tokens.rows[:, at : at + count], tokens.multiples[:, at : at + count]
            if own.name is None:
                assert not rows.any()
            else:
                wanted, by = expected(self.settings, own.name, own.ids, own.n_prompt)
                n = len(wanted)
                assert torch.equal(rows[:n].float(), wanted[:, begin : begin + count])
                assert not rows[n:].any()
                hit = rows[:n] > 0
                assert torch.allclose(multiples[:n][hit], by[:, begin : begin + count][hit], atol=1e-6)
                seen.add(own.name)
            own.at = begin + count
            at += count
        assert not tokens.rows[:, at:].any()
        for key in [key for key, own in self.living.items() if own.at == len(own.ids)]:
            del self.living[key]

    def params(self, own):
        return Named(extra_args=None if own.name is None else {"thinksteer": own.name, ADMITTED: True})


def first_runner(play):
    """V1: the batch holds the ids."""

    def run(batch):
        table = np.zeros((SEATS, LONGEST), dtype=np.int32)
        for i, (key, _, _) in enumerate(batch):
            table[i, : len(play.all[key].ids)] = play.all[key].ids
        requests = {
            key: Named(sampling_params=play.params(own), prompt_token_ids=own.ids[: own.n_prompt])
            for key, own in play.living.items()
        }
        runner = Named(
            requests=requests,
            input_batch=Named(
                req_ids=[key for key, _, _ in batch], token_ids_cpu=table,
                num_computed_tokens_cpu=np.array([begin for _, begin, _ in batch]),
            ),
            query_start_loc=Named(np=starts(batch)), input_ids=Named(gpu=ids_of(play, batch)),
        )  # fmt: skip
        fill_first(play.steering, runner)

    return run


def second_runner(play):
    """V2: told of requests as they are added and removed; one that was put off is added anew with all its ids."""
    state, added = second_class(Base, play.steering)(), {}

    def run(batch):
        for key in [key for key in added if key not in play.living]:
            state.remove_request(key)
            del added[key]
        for key, begin, _ in batch:
            own = play.all[key]
            if added.get(key) != begin:
                if key in added:
                    state.remove_request(key)
                known = own.ids[: max(own.n_prompt, begin + 1)]
                state.add_request(0, Named(
                    req_id=key, sampling_params=play.params(own), prompt_token_ids=own.ids[: own.n_prompt],
                    prefill_token_ids=known,
                ))  # fmt: skip
        now = Named(
            req_ids=[key for key, _, _ in batch], query_start_loc_np=starts(batch), input_ids=ids_of(play, batch),
            num_computed_tokens_np=np.array([begin for _, begin, _ in batch]),
        )  # fmt: skip
        state.preprocess_state(now, (), None, None)
        added.update({key: begin + count for key, begin, count in batch})

    return run


class Base:
    """A ModelState, as far as it is met."""

    def add_request(self, req_index, new_req_data):
        pass

    def remove_request(self, req_id):
        pass

    def preprocess_state(self, input_batch, block_tables, kv_cache_config, num_computed_tokens):
        pass


def starts(batch):
    return np.cumsum([0, *(count for _, _, count in batch)])


def ids_of(play, batch):
    own = [token for key, begin, count in batch for token in play.all[key].ids[begin : begin + count]]
    return torch.tensor(own, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("runner", [first_runner, second_runner])
def test_each_token_gets_the_rows_of_its_gates_whatever_the_schedule(runner, seed, settings):
    waiting = 2 if runner is first_runner else 0  # the second removes what is put off
    play, seen, passes = Play(settings, seed, waiting), set(), 0
    run = runner(play)
    while batch := play.schedule():
        run(batch)
        play.check(batch, seen)
        passes += 1
    assert all(own.at == len(own.ids) for own in play.all.values())
    assert passes > 20
    fired = {(row["recipe"], row["step"], row["phase"]): row["tokens"] for row in play.steering.log()}
    if runner is first_runner:  # which knows that a request that comes again is the same
        total = sum(
            int((expected(settings, own.name, own.ids, own.n_prompt)[0] > 0).sum())
            for own in play.all.values() if own.name is not None
        )  # fmt: skip
        assert sum(fired.values()) == total
        assert play.steering.status()["rebuilt"] > 0


def test_a_request_past_the_front_end_stops_the_engine_rather_than_run_unsteered(settings):
    steering = steering_of(settings)
    assert steering.asked({"thinksteer": "one", ADMITTED: True}, [1]) is not None
    for extra in ({"thinksteer": "nobody", ADMITTED: True}, {"thinksteer": "one"}):
        with pytest.raises(Refused, match="came past the front end"):
            steering.asked(extra, [1])


def test_what_the_host_does_not_know_is_said_and_not_guessed(settings):
    from thinksteer_vllm.steering import Asked, Share

    for known in ([1, 9], [1, 9, -1]):
        steering, share = steering_of(settings), Share("r", Asked(0, 1.0, [1]), 0, 1, 3, lambda _, own=known: own)
        with pytest.raises(RuntimeError, match="needs the tokens 0 to 3 of the request r"):
            steering.fill([share], torch.tensor([3]))
