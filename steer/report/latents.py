"""A page of latents: where each fires, what it says to the unembedding, its neighbours, its scores and controls."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from transformers import PreTrainedModel

from probes.directions.direction import tokens_along
from probes.figures.latents import latents_figure
from probes.files import staged_file
from probes.model.loading import origin_of, tokenizer_of
from probes.model.tokens import decode
from probes.saes._reason_score import ReasonScores
from probes.saes._verdicts import Verdicts
from probes.saes.contexts import Context, top_contexts
from probes.saes.reading import streamed
from probes.saes.sae import SparseAutoencoder
from probes.saes.usage import LatentUsage, latent_usage
from probes.thinking.spans import Span
from steer.report.html import number, page, paragraph, plot, share, table

TOKENS, NEIGHBOURS = 8, 5


def save_latents(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    latents: Sequence[int],
    spans: Sequence[Span],
    path: str | Path,
    *,
    scores: ReasonScores | None = None,
    verdicts: Verdicts | None = None,
) -> None:
    """One HTML file of these latents that needs no network: in the layout of sae_vis' and Neuronpedia's dashboards.

    A section for each: its numbers, the tokens its decoder row raises and lowers, the latents whose rows are nearest,
    its strongest contexts with each token coloured by its activation, and its course over the text where it fires most.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder
    >>> from probes.thinking import text_span
    >>> from steer.report import save_latents
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> save_latents(model, sae, [3, 5], [text_span(model, "a 3 b +4 c *7")], "latents.html")
    >>> from pathlib import Path
    >>> Path("latents.html").read_text().count("<section")
    3
    """
    usage, contexts = latent_usage(model, sae, spans), top_contexts(model, sae, latents, spans)
    near = _neighbours(sae, latents)
    sections = [("all", "All", _overview(latents, usage, scores, verdicts))]
    for latent in latents:
        body = _numbers(latent, usage, scores, verdicts)
        body += table(("raises", "lowers"), _lens(model, sae, latent))
        body += table(("nearest decoder rows", "cosine"), [(i, number(c)) for i, c in near[latent]])
        body += _contexts(model, contexts[latent])
        body += _course(model, sae, latent, spans, contexts[latent])
        sections.append((f"latent-{latent}", str(latent), body))
    title = f"Latents of {sae.site} in {origin_of(model).name}"
    with staged_file(Path(path)) as stage:
        stage.write_text(page(title, sections), encoding="utf-8")


def _overview(
    latents: Sequence[int], usage: LatentUsage, scores: ReasonScores | None, verdicts: Verdicts | None
) -> str:
    rows = []
    for i in latents:
        score = "" if scores is None else number(float(scores.score[i]), 5)
        verdict = "" if verdicts is None or i not in verdicts.latents else verdicts.verdict(i)
        rows.append((i, score, verdict, share(float(usage.frequency[i])), number(float(usage.largest[i]), 2)))
    head = paragraph(
        f"Read over {usage.tokens:,} tokens, attention sinks left out. A verdict says whether a latent follows the "
        "words of reasoning, its phase, both or neither."
    )
    return head + table(("latent", "ReasonScore", "verdict", "fires in", "largest activation"), rows)


def _numbers(latent: int, usage: LatentUsage, scores: ReasonScores | None, verdicts: Verdicts | None) -> str:
    rows = [("fires in", share(float(usage.frequency[latent]))), ("largest", number(float(usage.largest[latent]), 2))]
    if scores is not None:
        low, high = scores.inside.interval()[:, latent]
        rows += [
            ("ReasonScore", number(float(scores.score[latent]), 5)),
            ("entropy over words", number(float(scores.entropy[latent]))),
            ("more in windows, by text", f"{scores.inside.mean[latent]:+.3f} [{low:+.3f}, {high:+.3f}]"),
        ]
    if verdicts is not None and latent in verdicts.latents:
        at = verdicts.latents.index(latent)
        rows += [
            ("brought out by cues alone", share(float(verdicts.by_cue[at]))),
            ("stays without cues", share(float(verdicts.without_cues[at]))),
            ("verdict", verdicts.verdict(latent)),
        ]
    return table(("", ""), rows)


def _contexts(model: PreTrainedModel, contexts: Sequence[Context]) -> str:
    tokenizer = tokenizer_of(model)
    if not contexts:
        return paragraph("It fires nowhere in these texts.")
    largest, lines = contexts[0].peak, []
    for context in contexts:
        spans = "".join(
            f'<i class="towards-long" style="--shade:{max(value, 0) / largest:.3f}" title="{value:.3f}">'
            f"{escape(decode(tokenizer, [token]).replace(chr(10), '↵' + chr(10)))}</i>"
            for token, value in zip(context.ids, context.activations, strict=True)
        )
        lines.append(f'<p class="tokens" title="text {context.text}, position {context.position}">{spans}</p>')
    return f"<div>{''.join(lines)}</div>"


def _course(
    model: PreTrainedModel, sae: SparseAutoencoder, latent: int, spans: Sequence[Span], contexts: Sequence[Context]
) -> str:
    """Its activation over the text where it fires most."""
    if not contexts:
        return ""
    span = spans[contexts[0].text]
    (read,) = streamed(model, [span], sae.site, device=sae.decoder.device, label="")
    f = (sae.encode_at(read.x, [latent])[:, 0] * read.used).tolist()
    words = [decode(tokenizer_of(model), [token]) for token in span.ids]
    figure = latents_figure(words, {f"latent {latent}": f}, title=f"text {contexts[0].text}")
    figure.update_layout(height=240)
    return plot(figure)


def _neighbours(sae: SparseAutoencoder, latents: Sequence[int]) -> Mapping[int, list[tuple[int, float]]]:
    rows = torch.nn.functional.normalize(sae.decoder.float(), dim=1)
    found = {}
    for latent in latents:
        cosine = rows @ rows[latent]
        cosine[latent] = -2
        top = cosine.topk(min(NEIGHBOURS, len(rows) - 1))
        found[latent] = [(int(i), float(c)) for i, c in zip(top.indices, top.values, strict=True)]
    return found


def _lens(model: PreTrainedModel, sae: SparseAutoencoder, latent: int) -> list[tuple[str, str]]:
    """The tokens that a decoder row raises and lowers most."""
    row = torch.nn.functional.normalize(sae.decoder[latent].float(), dim=0)
    return [(f"{up!r} {x:+.2f}", f"{down!r} {y:+.2f}") for up, x, down, y in tokens_along(model, row, TOKENS)]
