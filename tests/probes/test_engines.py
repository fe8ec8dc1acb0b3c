"""`generate` and `evaluate` write with any engine; a store knows which; what one cannot do is refused."""

import pytest

from probes import Sampling, generate, load
from probes.engines import Engine, Written
from probes.generation._batch import Transformers
from steer import Add, Recipe, applied, evaluate, task_named
from steer.decoding import Budget, Controlled

GREEDY = Sampling(temperature=0, max_new_tokens=48)
PROMPTS = ["a 3 b +4 c *7", "a 3 b +4 c *7 quick", "a 5 b -2"]


class Backwards:
    """Writes with transformers, one row at a time, the last first; the answer is the same."""

    name = "backwards"

    def __init__(self):
        self.passes = 0

    def check(self, model, sampling, decoding):  # noqa: ARG002
        if decoding is not None:
            raise ValueError(f"The engine 'backwards' has no decoding controls, but {decoding.name} was asked for.")

    def write(self, model, rows, sampling, decoding, *, batch_size, run):
        for row in reversed(rows):
            self.passes += 1
            for part in Transformers().write(model, [row], sampling, decoding, batch_size=batch_size, run=run):
                yield [
                    Written(written.row, [*written.ids, 9, 9]) for written in part
                ]  # what follows the end is nothing


ENGINES = (Transformers, Backwards)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_is_one_and_writes_what_the_model_writes(engine):
    model = load("organism")
    assert isinstance(engine(), Engine)
    plain = generate(model, PROMPTS, sampling=GREEDY)
    assert [c.ids for c in generate(model, PROMPTS, sampling=GREEDY, engine=engine())] == [c.ids for c in plain]


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_belong_to_prompt_and_number(engine):
    model, hot = load("organism"), Sampling(temperature=1.0, max_new_tokens=48, seed=3)
    plain = generate(model, PROMPTS, samples=3, sampling=hot)
    assert [c.ids for c in generate(model, PROMPTS, samples=3, sampling=hot, engine=engine())] == [c.ids for c in plain]


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_and_recipes_are_the_same(engine, tmp_path):
    model, task = load("organism"), task_named("chains")
    problems = task.sample(12, "report")
    from probes.directions import direction_between

    shorter = direction_between(model, ["a 3 quick"], ["a 3"], "L2.resid_post", position="text_last")
    arms = {"steered": Recipe.of(model, [Add.of(shorter, 0.2)], scope="thinking")}
    own = evaluate(model, task, problems, arms, sampling=GREEDY, engine=engine(), store=tmp_path)
    assert own.to_dict() == evaluate(model, task, problems, arms, sampling=GREEDY).to_dict()


def test_a_store_knows_the_engine(tmp_path):
    model, path = load("organism"), tmp_path / "rows.jsonl"
    generate(model, PROMPTS, sampling=GREEDY, store=path, engine=(first := Backwards()))
    generate(model, PROMPTS, sampling=GREEDY, store=path, engine=(second := Backwards()))
    assert (first.passes, second.passes) == (3, 0)
    with pytest.raises(ValueError, match="by other weights, or under another recipe"):
        generate(model, PROMPTS, sampling=GREEDY, store=path)


def test_what_an_engine_cannot_do_is_refused_before_anything_is_written(tmp_path):
    model, engine = load("organism"), Backwards()
    with pytest.raises(ValueError, match="has no decoding controls, but Budget"):
        generate(model, PROMPTS, engine=engine, decoding=Controlled(model, Budget(4)), store=tmp_path / "rows.jsonl")
    assert engine.passes == 0
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_recipe_that_is_applied_is_seen_by_the_engine():
    model = load("organism")
    import torch

    from probes.model import Site
    from probes.model.passes import edits_of

    seen = []

    class Asking(Backwards):
        def check(self, model, sampling, decoding):  # noqa: ARG002
            seen.append(edits_of(model))

    recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.01)])
    with applied(model, recipe):
        generate(model, PROMPTS[:1], sampling=GREEDY, engine=Asking())
    assert seen == [(recipe.fingerprint(),)]
