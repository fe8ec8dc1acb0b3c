from .formats import export_recipe as export_recipe
from .formats import import_recipe as import_recipe
from .lens import lens_hooks as lens_hooks
from .shipped import TraceEdits as TraceEdits
from .table import FORMATS as FORMATS
from .table import Format as Format
from .traces import trace_edits as trace_edits
