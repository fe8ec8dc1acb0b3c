"""The checker of shapes and types in tests: beartype, to which an int is a float, as it is to Python."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
