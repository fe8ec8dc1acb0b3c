from .formats import export_recipe as export_recipe
from .formats import import_recipe as import_recipe
from .table import FORMATS as FORMATS
from .table import Format as Format
