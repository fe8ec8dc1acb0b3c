"""Readings of the residual stream, of what the model predicts, and of what it attends to."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._meter import Meter
from probes.activations.attention import Attended, locate, span_attention
from probes.activations.trajectories import SEGMENT, thinking_bounds
from probes.directions.direction import Direction
from probes.generation.completions import Completion
from probes.model.hooks import hook_inputs, hook_sites
from probes.model.passes import hooked
from probes.rows import Rows
from probes.saes.sae import Autoencoder
from steer.view.listening import Reading, Tell
from steer.view.track import Track

_ROWS = 256  # positions whose predictions are held in float32 at once
_SEGMENTS = 64  # of a chain that is too short for those of the paper


def projections(directions: Mapping[str, Direction]) -> Reading:
    """x·v/‖v‖ at each direction's site after reading each token, a track for each, by its name. The first position is
    left out: it is an attention sink.

    >>> from probes import direction_between, generate, load
    >>> from steer.view import projections, read_tracks
    >>> model = load("organism")
    >>> direction = direction_between(model, ["a 3 quick"], ["a 3"], "L2.resid_post")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> read_tracks(model, completion, [projections({"quick": direction})])
    [Track(name='quick', values=Tensor[21], unit='at L2.resid_post', group='projection')]
    """

    @contextmanager
    def reading(model: PreTrainedModel, _completion: Completion) -> Iterator[Tell]:
        found: dict[str, list[Tensor]] = {name: [] for name in directions}

        def see(names: Sequence[str], x: Float[Tensor, "1 new width"]) -> None:
            for name in names:
                found[name].append((x[0].float() @ directions[name].unit.to(x.device, torch.float32)).cpu())

        def tell() -> list[Track]:
            return [
                Track(name, _without_sink(torch.cat(parts)), f"at {directions[name].site}", "projection")
                for name, parts in found.items()
            ]

        sees = {
            site: partial(see, [name for name, one in directions.items() if one.site == site])
            for site in dict.fromkeys(direction.site for direction in directions.values())
        }
        with hook_sites(model, sees):
            yield tell

    return reading


def latents(sae: Autoencoder, numbers: Sequence[int]) -> Reading:
    """The activation of latents of an autoencoder at each token. The first position is left out: it is an attention
    sink.

    >>> from probes import generate, load
    >>> from probes.saes import load_sae
    >>> from steer.view import latents, read_tracks
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> [track.name for track in read_tracks(model, completion, [latents(load_sae("organism-L1"), [6, 171])])]
    ['latent 6', 'latent 171']
    """

    @contextmanager
    def reading(model: PreTrainedModel, _completion: Completion) -> Iterator[Tell]:
        parts: list[Tensor] = []

        def see(x: Float[Tensor, "1 new width"]) -> None:
            parts.append(sae.encode_at(x[0].to(sae.decoder.device, torch.float32), list(numbers)).cpu())

        def tell() -> list[Track]:
            rows = torch.cat(parts).float().unbind(1)
            return [
                Track(f"latent {number}", _without_sink(row), f"at {sae.site}", "latents")
                for number, row in zip(numbers, rows, strict=True)
            ]

        with hook_sites(model, {sae.site: see}):
            yield tell

    return reading


def confidence() -> Reading:
    """The log-probability of each generated token, and the entropy of the distribution that it was drawn from: as
    `probes.activations.confidences` has them, in nats.

    >>> from probes import generate, load
    >>> from steer.view import confidence, read_tracks
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> log_probability, entropy = read_tracks(model, completion, [confidence()])
    >>> round(float(entropy.values[8]), 3), bool(entropy.values[:8].isnan().all())
    (0.0, True)
    """

    @contextmanager
    def reading(model: PreTrainedModel, completion: Completion) -> Iterator[Tell]:
        ids, begin = torch.tensor(completion.all_ids), len(completion.prompt_ids)
        found, seen = torch.full((2, len(ids)), torch.nan), 0

        def see(_module: object, _args: object, output: Any) -> None:
            nonlocal seen
            first, stop = max(seen, begin - 1), min(seen + output.logits.shape[1], len(ids) - 1)
            for start in range(first, stop, _ROWS):  # a position predicts the next token
                at = slice(start + 1, min(start + _ROWS, stop) + 1)
                logits = output.logits[0, start - seen : at.stop - 1 - seen]
                found[:, at] = _of_logits(logits, ids[at]).cpu()
            seen += output.logits.shape[1]

        names = ("log-probability", "entropy")
        with hooked(model, model, see, side="output", place="the model's output", must=False):  # heard after the watch
            yield lambda: [
                Track(name, row, "nats", "confidence") for name, row in zip(names, found.unbind(), strict=True)
            ]

    return reading


def _of_logits(logits: Float[Tensor, "n d_vocab"], drawn: Int[Tensor, " n"]) -> Float[Tensor, "2 n"]:
    log = logits.float().log_softmax(-1)
    entropy = -(log.exp() * log.clamp(min=torch.finfo(log.dtype).min)).sum(-1)
    return torch.stack([log.gather(1, drawn[:, None].to(log.device))[:, 0], entropy])


def trajectory(segment: int | None = None) -> Reading:
    """Net and cumulative change of the stream over the thinking, as they stood after each segment: means over layers,
    as `probes.activations.Trajectory` has them in its `steps`.

    `segment` counts tokens: the paper's 500, or if left out fewer where the chain is short, so that it has 64 of them.
    The first segment has no change.

    >>> from probes import generate, load
    >>> from steer.view import read_tracks, trajectory
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> net, cumulative = read_tracks(model, completion, [trajectory(segment=4)])
    >>> [round(value, 1) for value in net.values[12:20].tolist()]
    [35.9, 35.9, 35.9, 35.9, 18.5, 18.5, 18.5, nan]
    """

    @contextmanager
    def reading(model: PreTrainedModel, completion: Completion) -> Iterator[Tell]:
        start, stop = thinking_bounds(completion)
        size = max(1, min(SEGMENT, (stop - start) // _SEGMENTS)) if segment is None else segment
        meter = Meter(model, size, -(-(stop - start) // size))
        wanted = torch.zeros(1, len(completion.all_ids), dtype=torch.bool, device=model.device)
        wanted[0, start:stop] = True
        state = meter.fresh(1)

        def begin(ids: Int[Tensor, "1 new"], _mask: Tensor | None, n_past: int, _rows: Rows | None) -> None:
            nonlocal state
            state = meter.taken(state)
            meter.begin(wanted[:, n_past : n_past + ids.shape[1]])

        def tell() -> list[Track]:
            (chain,) = meter.finished(meter.taken(state))
            steps = chain.steps.mean(2).float()
            of = torch.arange(len(completion.all_ids)).sub(start).div(size, rounding_mode="floor") - 1
            known = wanted[0].cpu() & (of >= 0)
            rows = torch.full((2, len(known)), torch.nan)
            rows[:, known] = steps[:, of[known]]
            names, unit = ("net change", "cumulative change"), f"in segments of {size}"
            return [Track(name, row, unit, "trajectory") for name, row in zip(names, rows.unbind(), strict=True)]

        with ExitStack() as stack:
            stack.enter_context(hook_inputs(model, begin))
            stack.enter_context(meter.listening())
            yield tell

    return reading


def attention(*texts: str) -> Reading:
    """The share of its attention on the prompt that each generated token pays to a text there: the mean over layers and
    heads, as `probes.activations.span_attention` has it. It needs the whole chain at once: a pass of its own.

    Raises ValueError where the prompt does not have a text.

    >>> from probes import generate, load
    >>> from steer.view import attention, read_tracks
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> (paid,) = read_tracks(model, completion, [attention("b +4")])
    >>> paid.name, bool(paid.values[8:].max() <= 1)
    ('b +4', True)
    """

    @contextmanager
    def reading(model: PreTrainedModel, completion: Completion) -> Iterator[Tell]:
        ids, begin = completion.all_ids, len(completion.prompt_ids)
        keys = [locate(model, completion.prompt_ids, text) for text in texts]

        def tell() -> list[Track]:
            rows = [Attended(ids, own, begin, begin, len(ids)) for own in keys]
            tracks = []
            for text, read in zip(texts, span_attention(model, rows), strict=True):
                values = torch.full((len(ids),), torch.nan)
                values[begin:] = read.share.nanmean((0, 1))
                tracks.append(Track(" ".join(text.split()), values, "of the prompt", "attention"))
            return tracks

        yield tell

    return reading


def _without_sink(values: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return values.clone().index_fill(0, torch.tensor([0]), torch.nan)
