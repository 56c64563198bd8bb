"""The backward SDE of Li et al. 2020: approximate gradients, by solving another SDE."""

from .adjoint import BackwardSDEAdjoint as BackwardSDEAdjoint
