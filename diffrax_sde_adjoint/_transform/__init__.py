"""Terms in, terms out: another SDE that has the same solution, or more of it."""

from .ito import (
    ito_to_stratonovich as ito_to_stratonovich,
    stratonovich_to_ito as stratonovich_to_ito,
)
from .path_kl import path_kl as path_kl, path_kl_of_shift as path_kl_of_shift
from .sensitivity import forward_sensitivity as forward_sensitivity
