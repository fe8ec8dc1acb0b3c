"""The names of places in a loaded model: Hugging Face module paths for sites, and back."""

from torch import nn

from probes.model.architectures import architecture_of, n_layers, tap_of
from probes.model.families import Tap
from probes.model.sites import Site, SiteName


def path_of(model: nn.Module, site: Site) -> str:
    """The Hugging Face module path whose input or output (`tap_of`) is `site`.

    Raises ValueError where the family has no such site, IndexError where layer or head is out of range.

    >>> from probes.model import Site, load, path_of
    >>> model = load("organism")
    >>> path_of(model, Site(2, "attn_out")), path_of(model, Site(2, "resid_mid"))
    ('model.layers.2.self_attn', 'model.layers.2.post_attention_layernorm')
    """
    _, tap = tap_of(model, site)
    return ".".join(part for part in (architecture_of(model).layers, str(site.layer), tap.path) if part)


def site_of(model: nn.Module, text: str) -> Site:
    """Read a site from our name, TransformerLens' name, or a Hugging Face path, whose output is meant.

    Raises ValueError, naming the outputs that are sites, where it is none of these.

    >>> from probes.model import load, site_of
    >>> model = load("organism")
    >>> [str(site_of(model, text)) for text in ("L2.attn_out", "blocks.2.hook_attn_out", "model.layers.2.self_attn")]
    ['L2.attn_out', 'L2.attn_out', 'L2.attn_out']
    """
    row = architecture_of(model)
    if not text.startswith(row.layers + "."):
        return Site.parse(text)
    layer, _, path = text[len(row.layers) + 1 :].partition(".")
    names = [name for name, tap in row.taps.items() if tap == Tap(path, "output") and name != "result"]
    if not layer.isdigit() or not names:
        known = ", ".join(sorted({tap.path or "(block)" for tap in row.taps.values() if tap.side == "output"}))
        raise ValueError(f"The output of {text!r} is not a site. In a block of this family these are: {known}.")
    return Site(int(layer), names[0])


def sites_in(model: nn.Module, name: SiteName) -> list[Site]:
    """The site of that name in every layer.

    >>> from probes.model import load, sites_in
    >>> [str(site) for site in sites_in(load("organism"), "resid_post")]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    return [Site(layer, name) for layer in range(n_layers(model))]
