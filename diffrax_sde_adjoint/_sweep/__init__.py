"""The backward sweep: the gradient of a solve, from its end and its tape."""

from .replay import replay as replay
from .reverse import inverts_last_step as inverts_last_step, reverse as reverse
from .staggered import can_stagger as can_stagger, staggered as staggered
from .sweep import (
    Cotangents as Cotangents,
    Sweep as Sweep,
    SweepState as SweepState,
    arrive as arrive,
)
