from .command import check_options as check_options
from .command import check_vllm as check_vllm
from .command import missing_for_vllm as missing_for_vllm
from .serving import Plan as Plan
from .serving import plan_of as plan_of
from .serving import serve_vllm as serve_vllm
from .settings import serving_settings as serving_settings
