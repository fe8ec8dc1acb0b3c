"""What an effect beside its controls says, in words."""

from collections.abc import Mapping

from steer.evaluation.evaluation import Evaluation, Score


def verdict(arm: str, score: Score, controls: Mapping[str, Score]) -> str:
    """One sentence on an arm's gain in accuracy, paired with the plain model's, beside the same of its controls.

    An effect is shown where its 95 % interval leaves out zero, and is the arm's own where it lies beyond the interval
    of the control that comes nearest to it.

    >>> from dataclasses import replace
    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import evaluate, verdict
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> plain = evaluate(model, task, task.sample(8, "report"), {}, sampling=sampling).score("plain")
    >>> edited = replace(plain, difference=0.22, difference_interval=(0.18, 0.26))
    >>> verdict("edited", edited, {"random heads": replace(plain, difference_interval=(-0.02, 0.03))})
    'edited gains +0.220 [+0.180, +0.260]: more than any control (random heads +0.000 [-0.020, +0.030]).'
    """
    low, high = score.difference_interval
    gain = f"{arm} {'gains' if score.difference >= 0 else 'loses'} {_told(score)}"
    if not (low > 0 or high < 0):  # of what cannot be told, too
        return f"{gain}: no effect is shown."
    if not controls:
        return f"{gain}: an effect, and no control stands beside it."
    sign = 1 if low > 0 else -1
    name, nearest = max(controls.items(), key=lambda item: sign * item[1].difference)
    beside = f"{name} {_told(nearest)}"
    reach = max(sign * bound for bound in nearest.difference_interval)
    if reach < min(sign * low, sign * high):
        return f"{gain}: more than any control ({beside})."
    if sign * nearest.difference >= sign * score.difference:
        return f"{gain}, and a control does as much ({beside}): the effect is not this edit's."
    return f"{gain}: the intervals overlap with a control's ({beside}), so it is not shown to be this edit's."


def on_groups(arm: str, groups: Mapping[str | None, Mapping[str, Score]]) -> list[str]:
    """The verdict on each group of problems, from the scores of all arms there; None are all problems."""
    said = []
    for group, scores in groups.items():
        controls = {name: score for name, score in scores.items() if any(word in name for word in _CONTROLS)}
        said.append(f"On {group or 'all'} problems, accuracy: {verdict(arm, scores[arm], controls)}")
    return said


def verdicts_on(evaluation: Evaluation, arm: str) -> list[str]:
    """Of one arm of an evaluation, group by group."""
    groups = evaluation.groups()
    return on_groups(
        arm, {group: {name: evaluation.score(name, group) for name in evaluation.arms} for group in groups}
    )


_CONTROLS = ("random", "lowest", "shuffled", "noise")  # in the names that our runs give them


def _told(score: Score) -> str:
    low, high = score.difference_interval
    return f"{score.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
