"""Where docstrings' references to other packages lead: ``[`diffrax.Heun`][]``.

The site is built without a network, so these are listed here and not fetched. A
reference that is in neither this list nor the API pages fails the strict build.
"""

_diffrax = "https://docs.kidger.site/diffrax/api"
_equinox = "https://docs.kidger.site/equinox/api"
_lineax = "https://docs.kidger.site/lineax/api"
_jax = "https://docs.jax.dev/en/latest"

_pages = {
    f"{_diffrax}/adjoints/": [
        "diffrax.AbstractAdjoint",
        "diffrax.BacksolveAdjoint",
        "diffrax.DirectAdjoint",
        "diffrax.ForwardMode",
        "diffrax.RecursiveCheckpointAdjoint",
    ],
    f"{_diffrax}/brownian/": [
        "diffrax.AbstractBrownianPath",
        "diffrax.BrownianIncrement",
        "diffrax.SpaceTimeLevyArea",
        "diffrax.SpaceTimeTimeLevyArea",
        "diffrax.UnsafeBrownianPath",
        "diffrax.VirtualBrownianTree",
    ],
    f"{_diffrax}/diffeqsolve/": ["diffrax.diffeqsolve"],
    f"{_diffrax}/events/": ["diffrax.Event"],
    f"{_diffrax}/saveat/": ["diffrax.SaveAt", "diffrax.SubSaveAt"],
    f"{_diffrax}/solution/": ["diffrax.RESULTS", "diffrax.Solution"],
    f"{_diffrax}/solvers/abstract_solvers/": [
        "diffrax.AbstractItoSolver",
        "diffrax.AbstractSolver",
        "diffrax.AbstractStratonovichSolver",
    ],
    f"{_diffrax}/solvers/ode_solvers/": [
        "diffrax.Heun",
        "diffrax.Midpoint",
        "diffrax.ReversibleHeun",
    ],
    f"{_diffrax}/stepsize_controller/": [
        "diffrax.ConstantStepSize",
        "diffrax.PIDController",
        "diffrax.StepTo",
    ],
    f"{_diffrax}/terms/": [
        "diffrax.AbstractTerm",
        "diffrax.ControlTerm",
        "diffrax.MultiTerm",
        "diffrax.ODETerm",
    ],
    f"{_equinox}/errors/": ["equinox.error_if"],
    f"{_equinox}/module/module/": ["equinox.Module"],
    f"{_lineax}/operators/": ["lineax.AbstractLinearOperator"],
    f"{_jax}/_autosummary/jax.shard_map.html": ["jax.shard_map"],
}


def on_pre_build(config):
    """Called by mkdocs; see `hooks` in `mkdocs.yml`."""
    references = config.plugins["autorefs"]
    for page, names in _pages.items():
        for name in names:
            references.register_url(name, f"{page}#{name}")
