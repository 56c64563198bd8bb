"""Solvers: those whose steps can be undone, and diffrax's with loops of other kinds."""

from .base import (
    AbstractForwardingSolver as AbstractForwardingSolver,
    AbstractReversibleSolver as AbstractReversibleSolver,
    AbstractSameSolver as AbstractSameSolver,
    check_sense as check_sense,
    has_layer as has_layer,
    is_reversible as is_reversible,
    layers as layers,
    never_fails as never_fails,
)
from .ees import EES25 as EES25, EES27 as EES27
from .reversible import Reversible as Reversible
from .reversible_heun import (
    ReversibleHeun as ReversibleHeun,
    carried as carried,
    sums_leaf_by_leaf as sums_leaf_by_leaf,
)
