from ._fit import collate as collate
from ._fit import fit as fit
from ._fit import training_batches as training_batches
from .donors import DONORS as DONORS
from .donors import train_donor as train_donor
from .grpo import train_grpo as train_grpo
from .organism import train as train
from .reasoner import train_reasoner as train_reasoner
