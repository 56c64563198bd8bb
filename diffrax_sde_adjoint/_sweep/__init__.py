"""The exact way back: the gradient of a solve from its end and its tape, by steps."""

from .rule import SweepRule as SweepRule
