from .settings import serving_settings as serving_settings
