"""`python -m disaggserve.cli`."""

from disaggserve.cli import main

main()
