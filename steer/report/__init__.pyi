from .record import check_record as check_record
from .thinkedit import render as render
from .thinkedit import write_report as write_report
