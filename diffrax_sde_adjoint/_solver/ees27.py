"""EES(2,7) of Shmelev et al. 2025."""

from typing import ClassVar

import diffrax
import numpy as np

from .effectively_symmetric import AbstractEffectivelySymmetric


_s = np.sqrt(2)
_a = (
    np.array([2 - _s]) / 3,
    np.array([(_s - 4) / 24, (4 + _s) / 8]),
    np.array([(145 * _s - 176) / 168, 3 * (8 - 5 * _s) / 56, 3 * (3 - _s) / 7]),
)
_b = np.array([5 - 3 * _s, 3 + _s, 6 * _s - 3, 9 - 4 * _s]) / 14
_tableau = diffrax.ButcherTableau(
    c=np.array([np.sum(row) for row in _a]),
    a_lower=_a,
    b_sol=_b,
    b_error=_b - np.array([1.0, 0.0, 0.0, 0.0]),
)


class EES27(AbstractEffectivelySymmetric):
    r"""EES(2,7): second order, four stages, and reversible up to a term of eighth
    order.

    As [`diffrax_sde_adjoint.EES25`][], with one more evaluation of the vector field a
    step, which makes undoing a step far more exact: it leads back to within $O(h^8)$
    for an ODE and $O(h^4)$ for an SDE. For $y' = -\lambda y$ it is stable up to
    $\lambda h = 3.92$. Its own error is smaller too, of the same order.

    Four evaluations of the vector field a step, forwards and backwards, and no state
    beside the solution. Has an embedded Euler method for adaptive step sizing, and uses
    linear interpolation for dense output.

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


EES27.__init__.__doc__ = """**Arguments:** None"""
