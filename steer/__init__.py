"""Change a model: interventions at run time, and the same interventions folded into weights."""

from steer.application import NeverFired, applied
from steer.checkpoints._diff import diff
from steer.comparison import compare
from steer.fold import NotFoldable, fold, folded
from steer.folding._export import export
from steer.interventions import Ablate, Add, Clamp, Rotate, Scale
from steer.recipes import Recipe, Step
from steer.runs import thinkedit
from steer.scopes import Condition, Controller, Schedule, Scope
from steer.scores import evaluate
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
