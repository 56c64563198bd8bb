"""Differentiate through stochastic differential equations with diffrax."""

import importlib.metadata

from ._adjoint import StochasticAdjoint as StochasticAdjoint
from ._backward_sde import BackwardSDEAdjoint as BackwardSDEAdjoint
from ._brownian import BrownianInterval as BrownianInterval
from ._lipschitz import clip_lipschitz as clip_lipschitz, lipswish as lipswish
from ._score import (
    WindowedEnergyScore as WindowedEnergyScore,
    energy_score as energy_score,
)
from ._solver import (
    EES25 as EES25,
    EES27 as EES27,
    AbstractReversibleSolver as AbstractReversibleSolver,
    Reversible as Reversible,
    ReversibleHeun as ReversibleHeun,
)
from ._transform import (
    forward_sensitivity as forward_sensitivity,
    ito_to_stratonovich as ito_to_stratonovich,
    path_kl as path_kl,
    path_kl_of_shift as path_kl_of_shift,
    stratonovich_to_ito as stratonovich_to_ito,
)


__version__ = importlib.metadata.version("diffrax_sde_adjoint")
