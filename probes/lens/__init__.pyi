from ._logit_lens import LogitLens as LogitLens
from ._logit_lens import logit_lens as logit_lens
from .contributions import Contribution as Contribution
from .contributions import LogitAttribution as LogitAttribution
from .contributions import direct_logit_attribution as direct_logit_attribution
from .inputs import Source as Source
from .inputs import token_ids as token_ids
