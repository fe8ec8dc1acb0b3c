from .protocol import Engine as Engine
from .protocol import Row as Row
from .protocol import Written as Written
