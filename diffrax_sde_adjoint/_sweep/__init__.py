"""The exact way back: the gradient of a solve from its end and its tape, by steps."""

from .rule import SweepRule as SweepRule
from .sweep import pages_between_looks as pages_between_looks
