from .condition import Condition as Condition
from .controller import Controller as Controller
from .controller import Schedule as Schedule
from .recipe import Recipe as Recipe
from .recipe import Step as Step
from .scope import Scope as Scope
