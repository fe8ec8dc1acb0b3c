from ._spread import Workers as Workers
from ._spread import spread as spread
from .saving import load_counts as load_counts
from .saving import load_recorded as load_recorded
from .saving import save_statistics as save_statistics
