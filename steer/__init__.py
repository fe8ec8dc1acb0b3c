"""Change a model: interventions at run time, and the same interventions folded into weights."""

from steer.checkpoints._diff import diff
from steer.evaluation._compare import compare
from steer.evaluation._evaluate import evaluate
from steer.folding._export import export
from steer.folding._fold import NotFoldable, fold, folded
from steer.interventions.activation import Ablate, Add, Clamp, Rotate, Scale
from steer.methods.thinkedit_run import thinkedit
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Condition, Controller, Schedule, Scope
from steer.runtime._applied import NeverFired, applied
from steer.tasks.named import task_named

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Condition",
    "Controller",
    "NeverFired",
    "NotFoldable",
    "Recipe",
    "Rotate",
    "Scale",
    "Schedule",
    "Scope",
    "Step",
    "applied",
    "compare",
    "diff",
    "evaluate",
    "export",
    "fold",
    "folded",
    "task_named",
    "thinkedit",
]
