"""Statistics in one safetensors file: the sums as tensors, the counts in its header."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from probes.activations._record import Recorded
from probes.activations.experts import ExpertCounts
from probes.activations.moments import Moments
from probes.files import check_keys, reading
from probes.model.sites import Site
from probes.tensors import read_tensors, write_tensors

Statistics = Mapping[Site, Recorded] | ExpertCounts
_PARTS = ("activation", "norm", "share")


def save_statistics(path: Path, statistics: Statistics, about: Mapping[str, Any] | None = None) -> None:
    """What `record` or a count of experts has summed up, as one safetensors file, bit for bit; `about` is kept with it.

    >>> from pathlib import Path
    >>> from probes import Site, load, record
    >>> from probes.scaling import load_recorded, save_statistics
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> found = record(model, [text_span(model, "a 3 b +4")], [site])
    >>> save_statistics(Path("found.safetensors"), found, {"model": "organism"})
    >>> load_recorded(Path("found.safetensors"))[site].activation
    Moments(count=1, total=Tensor[96])
    """
    if isinstance(statistics, ExpertCounts):
        tensors = {"counts": statistics.counts, "tokens": statistics.tokens}
        words: dict[str, Any] = {name: list(getattr(statistics, name)) for name in ("layers", "classes", "lacking")}
        kind = "expert counts"
    else:
        tensors = {f"{site}.{part}": getattr(own, part).total for site, own in statistics.items() for part in _PARTS}
        words = {
            "sites": {
                str(site): {"left_out": own.left_out, **{part: getattr(own, part).count for part in _PARTS}}
                for site, own in statistics.items()
            }
        }
        kind = "recorded"
    write_tensors(path, tensors, {"kind": kind, **words, "about": dict(about or {})})


def load_recorded(path: Path) -> dict[Site, Recorded]:
    """The moments at each site, as `save_statistics` wrote them. Raises ValueError for another file.

    >>> from pathlib import Path
    >>> from probes import Site, load, record
    >>> from probes.scaling import load_recorded, save_statistics
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> found = record(model, [text_span(model, "a 3 b +4")], [site])
    >>> save_statistics(Path("found.safetensors"), found)
    >>> bool((load_recorded(Path("found.safetensors"))[site].norm.mean == found[site].norm.mean).all())
    True
    """
    tensors, words = _read(path, "recorded", ("sites",))
    with reading(path, "file of recorded statistics"):
        return {Site.parse(site): _recorded(site, counts, tensors, path) for site, counts in words["sites"].items()}


def _recorded(site: str, counts: Mapping[str, int], tensors: Mapping[str, Tensor], path: Path) -> Recorded:
    check_keys(counts, ("left_out", *_PARTS), f"The site {site} of {path}")
    activation, norm, share = (Moments(int(counts[part]), tensors[f"{site}.{part}"]) for part in _PARTS)
    return Recorded(activation, norm, int(counts["left_out"]), share)


def load_counts(path: Path) -> ExpertCounts:
    """The counts of experts, as `save_statistics` wrote them. Raises ValueError for another file.

    >>> from pathlib import Path
    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> from probes.scaling import load_counts, save_statistics
    >>> model = load("organism")
    >>> save_statistics(Path("found.safetensors"), read_experts(model, generate(model, ["a 3 b +4"])).total())
    >>> counts = load_counts(Path("found.safetensors"))
    >>> counts.classes, counts.counts.shape
    (('all', 'prompt', 'thinking', 'answer'), torch.Size([4, 4, 8]))
    """
    tensors, words = _read(path, "expert counts", ("layers", "classes", "lacking"))
    with reading(path, "file of expert counts"):
        layers, classes, lacking = (tuple(words[name]) for name in ("layers", "classes", "lacking"))
        return ExpertCounts(layers, classes, tensors["counts"], tensors["tokens"], lacking)


def _read(path: Path, kind: str, keys: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, words = read_tensors(path)
    if words.get("kind") != kind:
        raise ValueError(f"{path} holds {words.get('kind') or 'no statistics of ours'}, not {kind}. Name another file.")
    check_keys(words, ("kind", "about", *keys), f"The header of {path}")
    return tensors, words
