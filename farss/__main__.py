"""`python -m farss`, and `torchrun -m farss`."""

from farss.cli import main

main()
