from .recipe import Recipe as Recipe
from .recipe import Step as Step
from .scope import Condition as Condition
from .scope import Controller as Controller
from .scope import Schedule as Schedule
from .scope import Scope as Scope
