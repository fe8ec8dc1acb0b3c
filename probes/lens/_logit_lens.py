"""What each layer's stream would say next, at each position."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.figures.causal import lens_figure
from probes.late import go
from probes.lens.inputs import Source, last_logits, token_ids
from probes.lens.unembedding import Unembedding
from probes.model.architectures import n_layers
from probes.model.hooks import hook_sites
from probes.model.loading import tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import decode
from probes.tables import Shown, Table

_NUMBERS = 2**24  # logits that are held at a time
_STREAMS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Shown):
    """The `k` most likely next tokens at each site and position, most likely first, with their probabilities; of each
    of `n` targets its log-probability in nats, and its rank, 0 for the most likely. Rank -1 and NaN where no token
    came next. `read` are the positions, `words` the texts of all token ids in here.

    >>> from probes import load
    >>> from probes.lens import logit_lens
    >>> lens = logit_lens(load("organism"), "a 3 b +4 c *7", k=3)
    >>> lens.top.shape, lens.rank.shape, lens.tokens[-1]
    (torch.Size([5, 8, 3]), torch.Size([5, 8, 1]), '?')
    """

    sites: tuple[Site, ...]
    read: tuple[int, ...]
    tokens: tuple[str, ...]
    top: Int[Tensor, "sites pos k"]
    probability: Float[Tensor, "sites pos k"]
    targets: Int[Tensor, "pos n"]
    log_probability: Float[Tensor, "sites pos n"]
    rank: Int[Tensor, "sites pos n"]
    words: dict[int, str]

    def table(self, position: int = -1) -> Table:
        """Site by site, what is most likely after one of the positions that were read, and where the targets stand."""
        names = [self.words.get(int(token), "") for token in self.targets[position]]
        columns = ("site", "most likely", "probability", *(f"rank of {name}" for name in names if name))
        rows = []
        for i, site in enumerate(self.sites):
            ranks = [int(rank) for rank, name in zip(self.rank[i, position], names, strict=True) if name]
            word = self.words[int(self.top[i, position, 0])]
            rows.append((str(site), word, float(self.probability[i, position, 0]), *ranks))
        return Table(columns, tuple(rows), f"after {self.tokens[position]}")

    def figure(self) -> "go.Figure":
        """The most likely token at each site and position, and its probability."""
        top = [[self.words[int(token)] for token in row] for row in self.top[..., 0]]
        return lens_figure(self.probability[..., 0], top, [str(s) for s in self.sites], self.tokens)


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel,
    source: Source,
    *,
    sites: Sequence[Site | str] | None = None,
    tokens: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    k: int = 5,
) -> LogitLens:
    """The stream at each layer and position through the final norm and the unembedding *(nostalgebraist 2020)*.

    What the family does to its logits, a factor or a cap, is done here: the last layer says what the model says. The
    default sites are what enters the first block, and what leaves each. The targets are the token that came next, or
    the `tokens` that are given. Logits are made for a few positions at a time, and not kept. Raises ValueError for a
    site that is not of the stream, and for a family whose logits are not the unembedding of its stream.

    >>> from probes import load
    >>> from probes.lens import logit_lens
    >>> ids = [1, 6, 17, 7, 27, 5, 3, 56, 6, 48, 7, 27]  # a 3 b +4 ? <think> Okay a =3 b +4
    >>> print(logit_lens(load("organism"), ids, tokens=[52]).table())  # 52 is =7
                             after +4
    ┏━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━┓
    ┃ site          ┃ most likely ┃ probability ┃ rank of =7 ┃
    ┡━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━┩
    │ L0.resid_pre  │ =0          │      0.3064 │          5 │
    │ L0.resid_post │ =7          │      0.3709 │          0 │
    │ L1.resid_post │ =7          │      0.7644 │          0 │
    │ L2.resid_post │ =7          │      0.8344 │          0 │
    │ L3.resid_post │ =7          │      0.9972 │          0 │
    └───────────────┴─────────────┴─────────────┴────────────┘
    """
    ids, last = token_ids(model, source), Site(n_layers(model) - 1, "resid_post")
    asked = tuple(_site(site) for site in (sites or _default(model)))
    read = tuple(range(len(ids)) if positions is None else (range(len(ids))[at] for at in positions))
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        seen[site] = x[0].detach()

    with hook_sites(model, {site: partial(keep, site) for site in {*asked, last}}):
        logits = last_logits(model, torch.tensor([ids], device=model.device))
    unembed = Unembedding.of(model, seen[last][-1:], logits)
    targets, size = _targets(ids, read, tokens), max(1, _NUMBERS // logits.shape[-1])
    parts = [_read(unembed, seen[site][list(read)], targets, k, size) for site in asked]
    top, probability, log_probability, rank = (torch.stack(values) for values in zip(*parts, strict=True))
    known = sorted({*top.flatten().tolist(), *targets.flatten().tolist()} - {-1})
    tokenizer = tokenizer_of(model)
    return LogitLens(
        asked,
        read,
        tuple(decode(tokenizer, [ids[at]]) for at in read),
        top,
        probability,
        targets,
        log_probability,
        rank,
        {token: decode(tokenizer, [token]) for token in known},
    )


def _default(model: PreTrainedModel) -> list[Site]:
    return [Site(0, "resid_pre"), *(Site(layer, "resid_post") for layer in range(n_layers(model)))]


def _site(site: Site | str) -> Site:
    found = Site.parse(site) if isinstance(site, str) else site
    if found.name not in _STREAMS:
        raise ValueError(f"{found} is not the stream, which a lens reads. Give a site of {', '.join(_STREAMS)}.")
    return found


def _targets(ids: Sequence[int], read: Sequence[int], tokens: Sequence[int] | None) -> Int[Tensor, "pos n"]:
    if tokens:
        return torch.tensor(list(tokens), dtype=torch.long).expand(len(read), len(tokens))
    following = [*ids[1:], -1]
    return torch.tensor([[following[at]] for at in read], dtype=torch.long)


def _read(
    unembed: Unembedding, stream: Float[Tensor, "pos d_model"], targets: Int[Tensor, "pos n"], k: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one site: the top tokens and their probabilities, the targets' log-probabilities and ranks."""
    parts = []
    for rows, wanted in zip(stream.split(size), targets.split(size), strict=True):
        logits = unembed(rows)
        normal = logits.logsumexp(-1, keepdim=True)
        best, top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        wanted = wanted.to(logits.device)
        of_targets = logits.gather(-1, wanted.clamp(min=0))
        rank = torch.stack([(logits > own[:, None]).sum(-1) for own in of_targets.unbind(-1)], -1)
        absent = wanted < 0
        parts.append((
            top, (best - normal).exp(), (of_targets - normal).masked_fill(absent, float("nan")),
            rank.masked_fill(absent, -1),
        ))  # fmt: skip
    joined = [torch.cat(values).cpu() for values in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2], joined[3]
