"""How much a job will generate, and about how long that takes, without doing it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from time import monotonic
from typing import TYPE_CHECKING

import probes.generation
import steer.evaluation
import steer.report
from probes.tables import Table
from steer.cli.options import end

if TYPE_CHECKING:
    import transformers

    import steer.methods
    import steer.recipes

MEASURED = 256  # tokens of a completion that are waited for, at most


@dataclass(frozen=True)
class Work:
    """Completions that a job generates, at most: what a store holds, and nulls that cannot be made, are fewer."""

    completions: int


def evaluation_work(arms: int, recipes: int, *, draws: int, n: int, samples: int) -> Work:
    """`arms` beside the plain one. A recipe comes with `draws` of the same norm, and as many of the same effect."""
    judged = steer.evaluation.nulls.N_JUDGED if recipes and draws else 0
    return Work(judged + (1 + arms + 2 * draws * recipes) * n * samples)


def sweep_work(strengths: int, *, draws: int, n_select: int, n_report: int, samples: int) -> Work:
    """Three kinds of null at the selected strength, on the report split."""
    return Work(samples * ((1 + strengths) * n_select + (1 + strengths + 3 * draws) * n_report))


def thinkedit_work(
    settings: "Sequence[steer.methods.thinkedit.ThinkEditSetting]",
    *,
    n_probe: int,
    n_select: int,
    n_report: int,
    samples: int,
    n_sweep: int,
) -> Work:
    """On the report split: plain, published, edited, lowest heads, one-sided if there is one, two kinds of null; and
    for the report, two sweeps of strength and three examples, plain and edited."""
    arms = 4 + any(setting.kind == "one_sided" for setting in settings) + 2
    defaults = {name: x.default for name, x in signature(steer.report.RunRecord.of).parameters.items()}
    doses = len(defaults["strengths"]), len(defaults["layer_strengths"])
    swept = sum(1 + strengths * (1 + defaults["draws"]) for strengths in doses) * min(n_sweep, n_select)
    kinds = len({setting.kind for setting in settings})
    chosen = steer.evaluation.selection.n_solved(len(set(settings)), n_select, n_kinds=kinds)
    return Work(n_probe + samples * (chosen + arms * n_report) + swept + 6)


def rice_work(
    tops: int, strengths: int, controls: int, *, draws: int, n_probe: int, n_select: int, n_report: int, samples: int
) -> Work:
    """On the report split: plain, each strength, the controls, renormalised, random experts, lowest scores."""
    report = 1 + strengths + controls + 1 + draws + 1
    chosen = steer.evaluation.selection.n_solved(tops * strengths, n_select)
    return Work(n_probe + samples * (chosen + report * n_report))


def tell(
    work: Work,
    model: "transformers.PreTrainedModel",
    prompts: Sequence[str],
    sampling: "probes.generation.Sampling",
    batch_size: int,
    as_json: bool,
) -> None:
    """Generate one batch of `prompts`, and say from its speed and its lengths how long the whole work takes.

    The batch is cut at 256 tokens; if some of it is, all are counted as long as they may be.
    """
    batch = list(prompts)[:batch_size]
    brief = replace(sampling, max_new_tokens=min(MEASURED, sampling.max_new_tokens))
    write = partial(probes.generation.generate, model, batch, batch_size=batch_size, label="measuring")
    with probes.generation.progress(2 * len(batch), label="measuring"):
        write(sampling=replace(brief, max_new_tokens=min(2, brief.max_new_tokens)))  # what is loaded with the first
        began = monotonic()
        done = write(sampling=brief)
        seconds = monotonic() - began
    tokens = sum(len(completion.ids) for completion in done)
    whole = brief == sampling or not any(completion.truncated for completion in done)
    length = tokens / len(done) if whole else float(sampling.max_new_tokens)
    most, speed = work.completions * sampling.max_new_tokens, tokens / seconds
    minutes = work.completions * length / speed / 60
    rows = (
        ("completions, at most", work.completions),
        ("tokens, at most", most),
        ("tokens a second", round(speed, 1)),
        ("minutes, about" if whole else "minutes, at most", round(minutes, 1)),
        ("measured on", f"one batch of {len(done)} completions, {tokens / len(done):.0f} tokens each on average"),
    )
    facts = {"completions": work.completions, "max_tokens": most, "tokens_per_second": speed, "minutes": minutes}
    end(Table(("Dry run", "nothing was done"), rows), {"dry_run": True, **facts}, as_json)
