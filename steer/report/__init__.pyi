from .record import RunRecord as RunRecord
from .record import save as save
from .thinkedit import render as render
from .thinkedit import write_report as write_report
