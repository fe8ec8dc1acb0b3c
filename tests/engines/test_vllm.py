"""vLLM with the plugin writes what Hugging Face writes with `applied`; and beside it, what vLLM writes without.

Each engine has a process of its own. `make vllm` runs this, in an environment of its own.
"""

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("thinksteer_vllm") is None:
    pytest.skip("needs vLLM and its plugin: make vllm", allow_module_level=True)

import cases

from steer.engines.vllm import serving_settings
from steer.engines.vllm.job import run_job

STRENGTHS = {"add": 0.5, "ablate-mid": -1.0, "rotate": 1.5, "scale-mlp": 2.0, "clamp-mlp": 0.6}
ENGINE = {
    "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8, "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True, "block_size": 32, "skip_tokenizer_init": True, "generation_config": "vllm",
    "enable_prefix_caching": True, "disable_log_stats": True,
}  # fmt: skip
FEW_BLOCKS = 14


@dataclass(frozen=True)
class Ready:
    """A family's model, recipes and settings on disk, and Hugging Face's answers."""

    family: str
    folder: Path
    settings: dict[str, Any]
    answers: dict[tuple[int, str | None, float], cases.Answer]

    def requests(self) -> list[dict[str, Any]]:
        asked = ((cases.prompts()[i], _xargs(name, strength)) for i, name, strength in self.answers)
        return cases.requests(asked)

    def run(self, name: str, *, plugin: bool = True, rounds: int = 1, bad: Any = (), **engine: Any) -> dict[str, Any]:
        extra = {"additional_config": self.settings} if plugin else {}
        job = {
            "model": str(self.folder / "model"), "engine": {**ENGINE, **extra, **engine}, "plugin": plugin,
            "rounds": [self.requests()] * rounds, "bad": list(bad),
        }  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | ({} if plugin else {"VLLM_PLUGINS": ""})
        place = self.folder / name
        place.mkdir(exist_ok=True)
        return run_job(job, place, env=own)

    def equal(self, got: list[dict[str, Any]]) -> list[tuple[int, str | None, float]]:
        """The requests whose tokens are not those of Hugging Face."""
        rows = zip(self.answers.items(), got, strict=True)
        return [key for (key, answer), own in rows if own["ids"] != answer.ids]


def _xargs(name: str | None, strength: float) -> dict[str, Any] | None:
    if name is None:
        return None
    return {"thinksteer": name} | ({} if strength == 1.0 else {"thinksteer_strength": strength})


@pytest.fixture(scope="module", params=cases.FAMILIES)
def ready(request, tmp_path_factory) -> Ready:
    folder = tmp_path_factory.mktemp(request.param)
    model = cases.build(request.param, folder / "model")
    recipes, answers = cases.recipes(model), {}
    for name, recipe in recipes.items():
        recipe.save(folder / name)
    for i, ids in enumerate(cases.prompts()):
        answers[i, None, 1.0] = cases.answer(model, ids, None)
        for name, recipe in recipes.items():
            answers[i, name, 1.0] = cases.answer(model, ids, recipe)
    for name, strength in STRENGTHS.items():
        recipe = cases.stronger(recipes[name], strength)
        answers[0, name, strength] = cases.answer(model, cases.prompts()[0], recipe)
    settings = serving_settings({name: folder / name for name in recipes}, model_delimiters(model))
    return Ready(request.param, folder, settings, answers)


def model_delimiters(model):
    from probes.model import delimiters_of

    return delimiters_of(model)


BAD = {
    "There is no recipe 'nobody'": ({"thinksteer": "nobody"}, {}),
    "There is no recipe 3": ({"thinksteer": 3}, {}),
    "is a finite number": ({"thinksteer": "add", "thinksteer_strength": "much"}, {}),
    "There is no recipe None": ({"thinksteer_strength": 2.0}, {}),
    "thinksteer_scope is not known": ({"thinksteer": "add", "thinksteer_scope": "all"}, {}),
}


@pytest.fixture(scope="module")
def cold_and_warm(ready):
    bad = [{"ids": [9, 10], "n": 2, "xargs": xargs, "more": more} for xargs, more in BAD.values()]
    return ready.run("served", rounds=2, bad=bad)


def test_tokens_are_those_of_hugging_face_with_a_cold_and_a_warm_cache(ready, cold_and_warm):
    first, second = cold_and_warm["rounds"]
    assert len(first) + len(second) >= 160
    assert ready.equal(first) == []
    assert ready.equal(second) == []
    assert not any(own["cached"] for own in first[:10])
    assert sum(bool(own["cached"]) for own in second) > len(second) / 3


def test_recipes_change_what_is_written(ready):
    """Else equal tokens would say little."""
    plain = {i: answer.ids for (i, name, _), answer in ready.answers.items() if name is None}
    changed = Counter(name for (i, name, _), answer in ready.answers.items() if answer.ids != plain[i])
    assert set(changed) == {name for _, name, _ in ready.answers if name is not None}


def test_what_was_touched_is_what_hugging_face_touched(ready, cold_and_warm):
    expected = Counter()
    for (_, name, _), answer in ready.answers.items():
        expected.update({(name, step, phase): n for (step, phase), n in answer.fired.items()})
    told = {(row["recipe"], row["step"], row["phase"]): row["tokens"] for row in cold_and_warm["logs"][0]}
    assert told == dict(expected)


def test_a_bad_request_is_refused_by_a_sentence_and_the_engine_lives_on(cold_and_warm):
    for sentence, got in zip(BAD, cold_and_warm["bad"], strict=True):
        assert got.startswith("VLLMValidationError")
        assert sentence in got


def test_the_worker_says_that_it_steers(ready, cold_and_warm):
    status = cold_and_warm["status"]
    assert status["steering"]
    assert status["recipes"] == ready.settings["thinksteer"]["fingerprints"]


def test_tokens_are_equal_when_requests_are_put_off_and_read_again(ready):
    told = ready.run("preempted", num_gpu_blocks_override=FEW_BLOCKS)
    assert ready.equal(told["rounds"][0]) == []
    assert told["status"]["rebuilt"] > 4 * len(cases.prompts())


def test_plain_requests_beside_steered_ones_are_those_of_an_engine_without_the_plugin(ready):
    ours = ready.run("beside", enable_prefix_caching=False)["rounds"][0]
    theirs = ready.run("without", plugin=False, enable_prefix_caching=False)["rounds"][0]
    plain = [n for n, (_, name, _) in enumerate(ready.answers) if name is None]
    assert len(plain) == len(cases.prompts())
    for n in plain:
        assert ours[n]["ids"] == theirs[n]["ids"]
        assert ours[n]["logprobs"] == theirs[n]["logprobs"]
    assert ours != theirs
    assert ready.equal(ours) == []


def test_a_recipe_of_another_model_is_refused_at_start(ready):
    if ready.family != "llama":
        pytest.skip("once is enough")
    path = ready.folder / "add" / "recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace(f"d_model: {cases.D_MODEL}", "d_model: 4096"))
    settings = {"thinksteer": {key: own for key, own in ready.settings["thinksteer"].items() if key != "fingerprints"}}
    told = ready.run("other", additional_config=settings)
    path.write_text(text)
    assert "was made for the model" in told["refused"]
    assert "d_model 4096 there, 96 here" in told["refused"]
