"""The completions of a record side by side, as HTML: each token coloured by its projection on the direction."""

from html import escape

from steer.report.examples import CompletionsRecord, ExampleRecord, SideRecord
from steer.report.html import paragraph, split_tag, token_span


def completions_section(completions: CompletionsRecord) -> str:
    """One problem of each kind, and the legend of the colours."""
    low, high = (f"{sign}{completions.scale:.3g}" for sign in "−+")
    legend = (
        f'<div class="legend"><span>{low} and below: like short thinking</span><span class="bar"></span>'
        f'<span>{high} and above: like long thinking</span><span class="box">outlined</span>'
        "<span>positions the direction was read at; the prompt is paler</span></div>"
    )
    text = (
        f"{completions.rule} A token's colour is the stream's projection on the direction at {completions.site} "
        "after reading that token, less the midpoint of both classes' means on the probe split; full colour is a "
        "class' mean. Only the outlined positions were used to estimate it. Point at a token for its number."
    )
    shown = "".join(_example(example, completions.scale) for example in completions.examples)
    return split_tag("report") + paragraph(text) + legend + (shown or "<p>No problem is of any of these kinds.</p>")


def _example(example: ExampleRecord, scale: float) -> str:
    about = f"{example.problem} (answer {example.answer}{', ' + example.subgroup if example.subgroup else ''})"
    sides = "".join(_side(name, side, scale) for name, side in (("plain", example.plain), ("edited", example.edited)))
    kind = example.kind[:1].upper() + example.kind[1:]
    return f'<h3>{escape(kind)}</h3><p><code>{escape(about)}</code></p><div class="pair">{sides}</div>'


def _side(name: str, side: SideRecord, scale: float) -> str:
    verdict = '<span class="right">right</span>' if side.correct else '<span class="wrong">wrong</span>'
    cut = ", truncated" if side.truncated else ""
    more = f'<p class="soft">… and {side.left_out:d} more tokens.</p>' if side.left_out else ""
    spans = [
        token_span(token, value, scale, at < side.prompt_tokens, side.read[0] <= at < side.read[1])
        for at, (token, value) in enumerate(zip(side.tokens, side.projections, strict=True))
    ]
    tokens = "".join(spans[: side.prompt_tokens]) + "<br>" + "".join(spans[side.prompt_tokens :])
    head = f"<p><b>{name}</b>: {verdict}, {side.thinking_tokens:d} thinking tokens{cut}</p>"
    return f'<div>{head}<div class="tokens">{tokens}</div>{more}</div>'
