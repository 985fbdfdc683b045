"""`python -m omninft`."""

from omninft.cli import main

main()
