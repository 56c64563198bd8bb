"""Differentiate through stochastic differential equations with diffrax."""

import importlib.metadata

from ._adjoint import StochasticAdjoint as StochasticAdjoint
from ._brownian import BrownianInterval as BrownianInterval
from ._solver import (
    AbstractReversibleSolver as AbstractReversibleSolver,
    ReversibleHeun as ReversibleHeun,
)


__version__ = importlib.metadata.version("diffrax_sde_adjoint")
