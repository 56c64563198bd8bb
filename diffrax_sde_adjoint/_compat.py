"""Everything that this package imports from the private parts of diffrax and equinox.

Nothing else in the package reaches behind a public name, so this file is the one to
read when a new release of either breaks something. Each import says what it is needed
for; `tests/test_compat.py` checks what is assumed about each.
"""

# The annotations of diffrax's own interfaces. Methods that implement an interface of
# diffrax have to accept just what diffrax's accept, and none of these names is public.
from diffrax._custom_types import (
    VF as VF,
    Args as Args,
    BoolScalarLike as BoolScalarLike,
    DenseInfo as DenseInfo,
    RealScalarLike as RealScalarLike,
    Y as Y,
)

# Whether the terms hold a Brownian path, by which diffrax too decides that a solver has
# to be one for SDEs; and whether this is an `UnsafeBrownianPath`, whose noise differs
# from one call to the next at equal times up to rounding: the sweep would see another
# path.
from diffrax._heuristics import is_sde as is_sde, is_unsafe_sde as is_unsafe_sde

# The state of diffrax's integration loop, and of what it saves. The saved outputs are
# where the cotangents of a solve arrive, and counters say how many steps were made and
# saved.
from diffrax._integrate import SaveState as SaveState, State as State

# The default of `SaveAt(fn=...)`, to recognise that no function was given.
from diffrax._saveat import save_y as save_y

# What `diffeqsolve` puts around every term, to look for the term inside.
from diffrax._term import WrapTerm as WrapTerm

# `nondifferentiable` and `nondifferentiable_backward` turn a derivative that would be
# wrong into an error that names its cause; `while_loop` is the loop that diffrax's
# integration takes as an argument, and the only one that writes buffers in place;
# `prevbefore` is the step between floating-point numbers that diffrax's controllers
# leave at a jump.
from equinox.internal import (
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    prevbefore as prevbefore,
    while_loop as while_loop,
)
