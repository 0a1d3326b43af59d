"""`python -m moebius` is the command line; `torchrun ... -m moebius train RECIPE` starts ranks."""

from moebius.cli import main

main()
