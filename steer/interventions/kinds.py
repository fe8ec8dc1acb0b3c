"""The one table of kinds: what a recipe file may name, the run time applies, and folding asks for an `affine` form.

A kind is a frozen dataclass with `kind`, `site`, `strength`, `vector`, `birth`, `check(model)` and a call that changes
an activation; one with `affine(width)` folds into weights, and exports. (A routing edit, and an `Attend`, change no
activation, and have no call.) To add one: write the class, and give it a row here. Its fields are the keys of a step in
the recipe file, read by their types: site, numbers, truths, words, and tensors.
"""

from collections.abc import Mapping

from steer.interventions.activation import Ablate, Add, Clamp, Intervention, Rotate, Scale
from steer.interventions.attention import Attend
from steer.interventions.latents import SetLatents
from steer.interventions.routing import Forbid, Force, Reinforce, RoutingEdit

Change = Intervention | RoutingEdit | Attend

KINDS: Mapping[str, type[Intervention] | type[RoutingEdit] | type[Attend]] = {
    kind.kind: kind for kind in (Add, Ablate, Scale, Clamp, Rotate, SetLatents, Reinforce, Force, Forbid, Attend)
}
