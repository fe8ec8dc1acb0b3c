from .chains import draw_chain as draw_chain
from .grading import is_correct as is_correct
from .named import task_named as task_named
from .task import SPLITS as SPLITS
from .task import Problem as Problem
from .task import Split as Split
from .task import Task as Task
from .task import split_of as split_of
