"""EES(2,5;1/10) of Shmelev et al. 2025."""

from typing import ClassVar

import diffrax
import numpy as np

from .effectively_symmetric import AbstractEffectivelySymmetric


_b = np.array([1 / 10, 1 / 2, 2 / 5])
_tableau = diffrax.ButcherTableau(
    c=np.array([1 / 3, 5 / 6]),
    a_lower=(np.array([1 / 3]), np.array([-5 / 48, 15 / 16])),
    b_sol=_b,
    b_error=_b - np.array([1.0, 0.0, 0.0]),
)


class EES25(AbstractEffectivelySymmetric):
    r"""EES(2,5): second order, three stages, and reversible up to a term of sixth
    order.

    A step is undone by the same step with the negative of the control. For an ODE this
    leads back to within $O(h^6)$ for a step of size $h$, and for an SDE, whose
    increments are of size $h^{1/2}$, to within $O(h^3)$. So gradients are those of the
    numerical solution up to this: *near-exact*.
    [`diffrax_sde_adjoint.StochasticAdjoint`][] raises an error if it adds up to too
    much.

    Three evaluations of the vector field a step, forwards and backwards, and no state
    beside the solution. For $y' = -\lambda y$ it is stable up to $\lambda h = 3.09$, so
    it does well with contracting dynamics, where
    [`diffrax_sde_adjoint.ReversibleHeun`][] does not. Undoing a contracting solve
    amplifies errors all the same, by $e^{\lambda T}$ over a horizon of length $T$:
    use `StochasticAdjoint(checkpoint_every=...)`, with $\lambda$ times the time between
    two states that are kept no more than about 3.

    Has an embedded Euler method for adaptive step sizing, and uses linear interpolation
    for dense output.

    When used to solve SDEs it converges to the Stratonovich solution, with strong order
    0.5 in general and 1 for commutative noise.

    ??? cite "Reference"

        ```bibtex
        @article{shmelev2025explicit,
            author={Shmelev, Daniil and Ebrahimi-Fard, Kurusch and Tapia, Nikolas
                    and Salvi, Cristopher},
            title={{E}xplicit and {E}ffectively {S}ymmetric {R}unge-{K}utta {M}ethods},
            year={2025},
            journal={arXiv preprint arXiv:2507.21006}
        }
        ```
    """

    tableau: ClassVar[diffrax.ButcherTableau] = _tableau


EES25.__init__.__doc__ = """**Arguments:** None"""
