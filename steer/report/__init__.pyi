from .latents import save_latents as save_latents
from .record import RunRecord as RunRecord
from .saved import save as save
from .saved import write_report as write_report
from .thinkedit import render as render
