from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .formats import export_recipe as export_recipe
from .formats import import_recipe as import_recipe
