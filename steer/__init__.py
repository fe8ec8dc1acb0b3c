"""Change a model: interventions at run time, and the same interventions folded into weights."""

from steer.checkpoints import export
from steer.differences import diff
from steer.fold import NotFoldable, fold, folded
from steer.interventions import Ablate, Add, Clamp
from steer.recipes import Recipe, Step, applied
from steer.runs import thinkedit
from steer.scores import evaluate
from steer.tasks import task_named

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "NotFoldable",
    "Recipe",
    "Step",
    "applied",
    "diff",
    "evaluate",
    "export",
    "fold",
    "folded",
    "task_named",
    "thinkedit",
]
