from .checkpoints._diff import diff as diff
from .evaluation._compare import compare as compare
from .evaluation._evaluate import evaluate as evaluate
from .folding._export import export as export
from .folding._fold import fold as fold
from .folding._fold import folded as folded
from .folding.draft import NotFoldable as NotFoldable
from .interventions.activation import Ablate as Ablate
from .interventions.activation import Add as Add
from .interventions.activation import Clamp as Clamp
from .interventions.activation import Rotate as Rotate
from .interventions.activation import Scale as Scale
from .interventions.attention import Attend as Attend
from .interventions.latents import SetLatents as SetLatents
from .methods.thinkedit_run import thinkedit as thinkedit
from .recipes.condition import Condition as Condition
from .recipes.controller import Controller as Controller
from .recipes.controller import Schedule as Schedule
from .recipes.recipe import Recipe as Recipe
from .recipes.recipe import Step as Step
from .recipes.scope import Scope as Scope
from .runtime._applied import NeverFired as NeverFired
from .runtime._applied import applied as applied
from .tasks.named import task_named as task_named

__version__: str
