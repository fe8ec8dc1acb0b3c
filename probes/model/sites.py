"""The names of places on the forward pass.

    resid_pre ─┬─ norm ─ attn_in ─ attention ─ z ─ o_proj ─ attn_out ─┐
               └─────────────────────────────────────────────────(+)─ resid_mid
    resid_mid ─┬─ norm ─ mlp_in ─ MLP or experts ─ mlp_out ─┐
               └───────────────────────────────────────(+)─ resid_post

`attn_out` and `mlp_out` are what is added to the stream. `z` is the input of `o_proj`, head by head.
`L5H7.result` is what head 7 contributes to the output of `o_proj`: its columns of the matrix times its `z`.
`L5H7.pattern` is what head 7 pays attention to: it is scaled, or read by `probes.activations.span_attention`.
`L5E7.routing` is the weight that the router of a sparse block gives expert 7; `probes.model.routers` reads it.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from probes.words import checked

# In the order in which a block computes them.
SiteName = Literal[
    "resid_pre", "attn_in", "pattern", "z", "result", "attn_out", "resid_mid", "mlp_in", "routing", "mlp_out",
    "resid_post",
]  # fmt: skip
SITE_NAMES: tuple[SiteName, ...] = get_args(SiteName)

_OURS = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+))?(?:E(?P<expert>\d+))?\.(?P<name>\w+)")
_THEIRS = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<path>[\w.]+)")
_TRANSFORMER_LENS: dict[SiteName, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_in": "attn.hook_in",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "result": "attn.hook_result",
    "routing": "mlp.hook_expert_weights",
}


@checked
@dataclass(frozen=True, order=True)
class Site:
    """One place in one layer, written as the field writes it: `L12.resid_post`, `L12H7.z`, `L12E7.routing`.

    A name without head or expert is the whole activation. Raises ValueError for a part that a site does not have.

    >>> from probes import Site
    >>> site = Site(12, "resid_post")
    >>> str(site), site.transformer_lens, Site.parse("L12H7.z")
    ('L12.resid_post', 'blocks.12.hook_resid_post', Site(layer=12, name='z', head=7, expert=None))
    >>> Site(12, "resid_post", head=7)
    Traceback (most recent call last):
        ...
    ValueError: resid_post is not split into heads: write L12.resid_post.
    """

    layer: int
    name: SiteName
    head: int | None = None
    expert: int | None = None

    def __post_init__(self) -> None:
        if self.expert is not None and self.name != "routing":
            raise ValueError(f"{self.name} is not split into experts: write L{self.layer}.{self.name}.")
        if self.head is not None and self.name not in ("pattern", "z", "result"):
            raise ValueError(f"{self.name} is not split into heads: write L{self.layer}.{self.name}.")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read `L12.resid_post`, `L12H7.z`, or a TransformerLens name such as `blocks.12.hook_resid_post`."""
        if match := _THEIRS.fullmatch(text):
            for name, path in _TRANSFORMER_LENS.items():
                if path == match["path"]:
                    return cls(int(match["layer"]), name)
        match = _OURS.fullmatch(text)
        if match is None or match["name"] not in SITE_NAMES:
            raise ValueError(
                f"{text!r} is not a site. Write L<layer>.<name>, L<layer>H<head>.z or L<layer>E<expert>.routing, where "
                f"<name> is one of {', '.join(SITE_NAMES)}, or a TransformerLens name: blocks.12.hook_resid_post."
            )
        head, expert = (None if match[part] is None else int(match[part]) for part in ("head", "expert"))
        return cls(int(match["layer"]), match["name"], head, expert)

    @property
    def transformer_lens(self) -> str:
        """The hook's name in TransformerLens, where a head or an expert is an index into its tensor."""
        return f"blocks.{self.layer}.{_TRANSFORMER_LENS[self.name]}"

    def __str__(self) -> str:
        part = f"H{self.head}" if self.head is not None else f"E{self.expert}" if self.expert is not None else ""
        return f"L{self.layer}{part}.{self.name}"
