"""Tasks in lm-eval's schema over our arms: its numbers are those of the samples, likelihoods those of its own model.

It needs lm-eval, which is an extra: `make peers`.
"""

import json
import random

import numpy as np
import pytest
import torch

from probes import Site, load
from probes.model.loading import ORGANISM
from steer import Add, Recipe, task_named
from steer.decoding import Budget
from steer.harness import Answering, Metric, evaluate_harness
from steer.harness._evaluate import harness_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'thinksteer[lm-eval]'")
pytestmark = pytest.mark.peers

GENERATES = """
task: chains_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "<bos> {{{{question}}}} ?"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<eos>"], max_gen_toks: 48, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSES = """
task: chains_chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "<bos> {{{{question}}}} ? <think> Easy </think>"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(answer)}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WRITTEN, CHOSEN = Metric("chains_written", "exact_match"), Metric("chains_chosen", "acc")


@pytest.fixture(scope="module")
def model():
    return load("organism", dtype=torch.float32)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two local task files over the same twelve problems."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    lines = []
    for problem in task_named("chains").sample(12, "report"):
        others = [d for d in "0123456789" if d != problem.answer]
        choices = rng.sample([problem.answer, *rng.sample(others, 3)], 4)
        lines.append(json.dumps({"question": problem.question, "answer": problem.answer, "choices": choices}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    for name, text in (("written", GENERATES), ("chosen", CHOOSES)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def recipe(model):
    vector = torch.randn(96, generator=torch.Generator().manual_seed(0))
    return Recipe.of(model, [Add(Site(2, "resid_post"), 3 * vector / vector.norm() * 10)])


def test_what_is_written_is_graded_by_the_harness_and_paired_by_us(model, tasks, recipe, tmp_path):
    arms = {"steered": recipe, "budget": Budget(thinking=3)}
    found = evaluate_harness(model, str(tasks / "written.yaml"), arms, store=tmp_path)
    assert found.metrics == (WRITTEN,)
    values = {arm: scores[WRITTEN].values for arm, scores in found.arms.items()}
    assert {arm: scores[WRITTEN].told for arm, scores in found.arms.items()} == {
        arm: pytest.approx(own.mean()) for arm, own in values.items()
    }
    for arm in ("plain", *arms):  # our own reading of what the harness kept
        samples = json.loads((tmp_path / arm / "samples.json").read_text())["samples"]["chains_written"]
        ours = [sample["filtered_resps"][0].strip() == sample["target"] for sample in samples]
        assert ours == list(values[arm] == 1)
    assert values["plain"].mean() > values["budget"].mean()
    difference, (low, high) = found.difference("budget", WRITTEN)
    assert low <= difference <= high
    assert difference == pytest.approx(values["budget"].mean() - values["plain"].mean())
    assert set(found.p_values(WRITTEN)) == {"steered", "budget"}
    again = evaluate_harness(model, str(tasks / "written.yaml"), {}, store=tmp_path)  # nothing is generated again
    assert np.array_equal(again.arms["plain"][WRITTEN].values, values["plain"])


def test_likelihoods_are_those_of_its_own_model(model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(ORGANISM), device="cpu", dtype="float32", batch_size=3)
    pairs = [("<bos> a 3 b +4 ? <think> Easy </think>", f" {d}") for d in range(10)] + [("<bos> a 5", " b -2 ?")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = harness_model(Answering(model, batch_size=4)).loglikelihood(requests)
    for (total, greedy), (other, also) in zip(ours, theirs.loglikelihood(requests), strict=True):
        assert total == pytest.approx(other, abs=1e-4)
        assert greedy == also
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("a 3 b +4 ?", "a 5"))]
    own = harness_model(Answering(model)).loglikelihood_rolling(texts)
    assert own == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-4)


def test_a_steered_model_chooses_otherwise_and_a_control_is_refused(model, tasks, recipe):
    found = evaluate_harness(model, str(tasks / "chosen.yaml"), {"steered": recipe})
    plain, steered = (found.arms[arm][CHOSEN] for arm in ("plain", "steered"))
    assert plain.told == pytest.approx(plain.values.mean())
    assert plain.is_mean
    assert plain.told != steered.told
    assert Metric("chains_chosen", "acc_norm") in found.metrics
    with pytest.raises(ValueError, match="asks how likely given answers are"):
        evaluate_harness(model, str(tasks / "chosen.yaml"), {"budget": Budget(thinking=3)})


def test_fewer_documents_and_examples_before_them(model, tasks):
    found = evaluate_harness(model, str(tasks / "chosen.yaml"), {}, n=5)
    assert len(found.arms["plain"][CHOSEN].values) == 5
    assert len(found.table().rows) == 2


def test_what_cannot_be_is_told_in_a_sentence(model, tmp_path):
    with pytest.raises(ValueError, match="'no-such-task' is no task of lm-eval"):
        evaluate_harness(model, "no-such-task", {})
    with pytest.raises(ValueError, match="is no file"):
        evaluate_harness(model, str(tmp_path / "none.yaml"), {})
    (tmp_path / "bad.yaml").write_text("metric: acc\n")
    with pytest.raises(ValueError, match="has no line `task: NAME`"):
        evaluate_harness(model, str(tmp_path / "bad.yaml"), {})
    with pytest.raises(ValueError, match="The data of the task 'arc_easy' could not be fetched"):
        evaluate_harness(model, "arc_easy", {}, n=1)
