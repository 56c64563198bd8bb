from .base import (
    AbstractReversibleSolver as AbstractReversibleSolver,
    is_reversible as is_reversible,
)
from .reversible_heun import (
    ReversibleHeun as ReversibleHeun,
    sums_leaf_by_leaf as sums_leaf_by_leaf,
)
