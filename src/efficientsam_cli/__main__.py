"""`python -m efficientsam_cli`, as torchrun starts it."""

from . import app

app()
