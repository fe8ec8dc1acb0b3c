from .launch import ENGINES as ENGINES
from .launch import Address as Address
from .launch import check_installed as check_installed
from .launch import missing as missing
from .launch import serve as serve
from .service import Service as Service
