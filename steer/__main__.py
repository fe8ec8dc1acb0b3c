"""`python -m steer`."""

from steer.cli.main import main

main()
