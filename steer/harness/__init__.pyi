from ._evaluate import check_installed as check_installed
from ._evaluate import evaluate_harness as evaluate_harness
from .answering import Answering as Answering
from .table import HarnessEvaluation as HarnessEvaluation
from .table import Metric as Metric
from .table import Scores as Scores
