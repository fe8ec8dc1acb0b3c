from ._parity import TOLERANCE as TOLERANCE
from ._parity import Heard as Heard
from ._parity import Parity as Parity
from ._parity import Way as Way
from ._parity import parity as parity
