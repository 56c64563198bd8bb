"""The exact way back: the gradient of a solve from its end and its tape, by steps."""

from .rule import SweepRule as SweepRule
from .sweep import steps_between_looks as steps_between_looks
