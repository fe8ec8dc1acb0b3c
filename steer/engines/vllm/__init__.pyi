from .engine import VLLM as VLLM
from .settings import serving_settings as serving_settings
from .ways import vllm_ways as vllm_ways
