"""Programs around a solve, of all that a user can combine: a loss, made from a
description, whose gradient by one adjoint can be compared with that by another.

Beside what `test_adjoint_cases.py` names, these have several noises, operators of every
kind, terms of a user's own, converted terms, and solves that are batched, scanned over,
or inside of a conditional or a checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
from helpers import reference_value_and_grad, struct
from recorded_steps import Recording, Repeating
from test_adjoint_cases import (
    first_entry,
    make_adaptive,
    make_saveat,
    solvers as named_solvers,
    with_levy_area,
)

from diffrax_sde_adjoint import (
    EES25,
    EES27,
    BrownianInterval,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
    forward_sensitivity,
    ito_to_stratonovich,
    path_kl,
    path_kl_of_shift,
    stratonovich_to_ito,
)


solvers = {
    **named_solvers,
    "diffrax.ReversibleHeun": diffrax.ReversibleHeun(),
    "EES25": EES25(),
    "EES27": EES27(),
    "Reversible(Heun)": Reversible(diffrax.Heun()),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5()),
}
near_exact = ("EES25", "EES27")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program is made of, by name.

    `batches` are the axes of nested `jax.vmap`s, the outermost one first, each named by
    what it is over. `around` is what surrounds the solve, inside of the batches or,
    with `is_outside`, outside of them.
    """

    solver: str = "ReversibleHeun"
    noise: str = "diagonal"
    num_noises: int = 1
    state: str = "array"
    terms: str = "plain"
    has_closures: bool = False
    conversion: str | None = None
    saveat: str = "t1"
    event: str | None = None
    controller: str = "constant"
    cells: str = "steps"
    backward: bool = False
    dtype: Any = jnp.float64
    batches: tuple[str, ...] = ()
    around: str | None = None
    is_outside: bool = False
    checkpoint_every: int | None = None
    store_all: bool = False
    max_steps: int | None = 100
    differentiate_ts: bool = False
    differentiate_times: bool = False

    @property
    def is_adaptive(self) -> bool:
        return self.controller not in ("constant", "step to")

    @property
    def is_recorded(self) -> bool:
        """Whether the reference is to make the very steps that ours made, as in
        `recorded_steps.py`. What is differentiated in times is smooth in them.
        """
        return self.is_adaptive and not self.differentiate_times

    @property
    def y_dtype(self) -> Any:
        if self.state != "complex":
            return self.dtype
        return jnp.complex128 if self.dtype == jnp.float64 else jnp.complex64


# Inputs of a program, each of which can be batched.
_batched_inputs = {
    "key": ("seed",),
    "y0": ("seed", "y0"),
    "args": ("args",),
    "y0 and args": ("y0", "args"),
    "t1": ("seed", "length"),
    "t1, also t0": ("seed", "length"),
    "ts": ("seed", "fractions"),
}


def _inputs_of(program: Program, batch: str) -> tuple[str, ...]:
    names = _batched_inputs[batch]
    if program.is_outside and program.around == "scan" and "y0" not in names:
        # A solve of the batch starts where the one before it ended.
        names = (*names, "y0")
    return names


def _sin(x):
    """That of a complex number is not bounded, and solutions would not be either."""
    if jnp.iscomplexobj(x):
        return lax.complex(jnp.sin(jnp.real(x)), jnp.sin(jnp.imag(x)))
    return jnp.sin(x)


def _drift(params, t, y, args):
    t = jnp.asarray(t, y.dtype)
    return _sin(params["weight"] @ y + t) - args["rate"] * y


def _diffusion(params, noise, t, y, args):
    """As an array or an operator, for a vector `y`."""
    t = jnp.asarray(t, y.dtype)
    scale = params["scale"]
    diagonal = args["level"] * (1.2 + _sin(1.5 + scale * y + t))
    # Three noises: neither square nor commutative.
    matrix = jnp.stack([diagonal, _sin(y * scale[::-1]), 0.3 * y], axis=-1)
    match noise:
        case "scalar" | "diagonal array":
            return diagonal
        case "diagonal":
            return lx.DiagonalLinearOperator(diagonal)
        case "general":
            return matrix
        case "additive":
            return (
                args["level"]
                * (1 + t)
                * jnp.stack([scale, jnp.cos(scale[::-1]), scale**2], axis=-1)
            )
        case "matrix operator":
            return lx.MatrixLinearOperator(matrix)
        case "product operator":
            square = lx.DiagonalLinearOperator(diagonal)
            return square @ lx.MatrixLinearOperator(matrix)
        case "function operator":
            return lx.FunctionLinearOperator(
                lambda x: matrix @ x, struct((3,), y.dtype)
            )
        case "Jacobian operator":
            return lx.JacobianLinearOperator(
                lambda x, args: jnp.sin(matrix @ x), jnp.ones(3, y.dtype)
            )
        case _:
            raise AssertionError


_noise_shapes = {"scalar": (), "diagonal": (2,)}


def _on_state(state: str, noise: str, params, empty):
    """The drift and the diffusion for a structure of the state, as functions of the
    parameters, time, state and `args`; the shape of the noise; and the initial state.
    """
    to_tree = lambda x, empty: {"a": x[:1], "b": (x[1:], empty)}
    y0 = params["y0"]
    if state in ("array", "complex"):
        diffusion = lambda p, *x: _diffusion(p, noise, *x)
        return _drift, diffusion, _noise_shapes.get(noise, (3,)), y0
    if state == "scalar":
        to_vector = lambda y: jnp.stack([y, 0.5 * y])
        from_vector = jnp.sum
        y0 = y0[0]
        shape = ()
        kind = "scalar"
        to_vf = lambda x: lx.DiagonalLinearOperator(x) if noise == "diagonal" else x
        to_diffusion = lambda x: to_vf(jnp.sum(x))
    else:
        assert state == "tree"
        to_vector = lambda y: jnp.concatenate([y["a"], y["b"][0]])
        from_vector = lambda x: to_tree(x, empty)
        y0 = to_tree(y0, empty)
        if noise == "diagonal":
            shape = {"a": (1,), "b": ((1,), (0,))}
            kind = "diagonal array"
            to_diffusion = lambda x: lx.DiagonalLinearOperator(to_tree(x, empty))
        else:
            # Each leaf has its own noise.
            shape = {"a": (3,), "b": ((3,), (2,))}
            kind = "general"
            to_diffusion = lambda x: to_tree(x, jnp.ones((0, 2), empty.dtype))
    return (
        lambda p, t, y, args: from_vector(_drift(p, t, to_vector(y), args)),
        lambda p, t, y, args: to_diffusion(_diffusion(p, kind, t, to_vector(y), args)),
        shape,
        y0,
    )


class VectorField(eqx.Module):
    """A function of parameters, which are a part of it."""

    fn: Callable = eqx.field(static=True)
    params: Any

    def __call__(self, t, y, args):
        return self.fn(self.params, t, y, args)


class Forwarding(diffrax.AbstractTerm):
    """A user's own term, of which no more is known than that it is one."""

    term: diffrax.AbstractTerm

    def vf(self, t, y, args):
        return self.term.vf(t, y, args)

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf, control):
        return self.term.prod(vf, control)


class EarlyODETerm(diffrax.ODETerm):
    def vf(self, t, y, args):
        return super().vf(t + 0.1, y, args)


class EarlyControlTerm(diffrax.ControlTerm):
    def vf(self, t, y, args):
        return super().vf(t + 0.1, y, args)

    def vf_prod(self, t, y, args, control):
        return self.prod(self.vf(t, y, args), control)


class HalfODETerm(diffrax.ODETerm):
    def prod(self, vf, control):
        return jtu.tree_map(lambda x: 0.5 * x, super().prod(vf, control))


class HalfControlTerm(diffrax.ControlTerm):
    def prod(self, vf, control):
        return jtu.tree_map(lambda x: 0.5 * x, super().prod(vf, control))

    def vf_prod(self, t, y, args, control):
        return self.prod(self.vf(t, y, args), control)


_term_types = {
    "own vf": (EarlyODETerm, EarlyControlTerm),
    "own prod": (HalfODETerm, HalfControlTerm),
}


def takes_any_terms(solver: str) -> bool:
    """Others look for one drift and one noise."""
    return solvers[solver].term_structure is diffrax.AbstractTerm


def _make_terms(program: Program, params, paths, empty):
    drift, diffusion, *_ = _on_state(program.state, program.noise, params, empty)
    if program.controller == "jumps":
        without_jumps = drift

        def with_jumps(params, t, y, args):
            size = jnp.where(t < 0.3, 0, jnp.where(t < 0.5, 1.5, -1.0))
            add = lambda x: x + size.astype(x.dtype) * args["rate"]
            return jtu.tree_map(add, without_jumps(params, t, y, args))

        drift = with_jumps

    if program.has_closures:
        make_vf = lambda fn, params: lambda *x: fn(params, *x)
    else:
        make_vf = VectorField
    ode_term, control_term = _term_types.get(
        program.terms, (diffrax.ODETerm, diffrax.ControlTerm)
    )
    other_params = {**params, "scale": 0.5 + params["scale"][::-1]}
    drift_term = ode_term(make_vf(drift, params))
    noise_terms = [
        control_term(make_vf(diffusion, p), path)
        for p, path in zip((params, other_params), paths, strict=False)
    ]
    if program.terms == "forwarding":
        noise_terms = [Forwarding(x) for x in noise_terms]
        if takes_any_terms(program.solver):
            drift_term = Forwarding(drift_term)
    if len(noise_terms) == 0:
        return drift_term
    if len(noise_terms) == 2 and not takes_any_terms(program.solver):
        return diffrax.MultiTerm(drift_term, diffrax.MultiTerm(*noise_terms))
    return diffrax.MultiTerm(drift_term, *noise_terms)


def _convert(program: Program, terms, y0, args, paths, prior_shift):
    """`terms`, `y0` and `args`, converted; and what takes the solution from what is
    then the state.
    """
    same = lambda y: y
    name, _, setting = (program.conversion or "").partition(", ")
    match name:
        case "":
            return terms, y0, args, same
        case "ito_to_stratonovich":
            elementwise = setting == "elementwise"
            converted = ito_to_stratonovich(terms, elementwise=elementwise)
            return converted, y0, args, same
        case "stratonovich_to_ito":
            elementwise = setting == "elementwise"
            converted = stratonovich_to_ito(terms, elementwise=elementwise)
            return converted, y0, args, same
        case "forward_sensitivity":
            directions = lambda x: jnp.stack([jnp.ones_like(x), 0.5 + 0 * x])
            dot_y0 = jtu.tree_map(directions, y0)
            dot_args = {"rate": directions(args["rate"]), "level": None}
            return forward_sensitivity(terms), (y0, dot_y0), (args, dot_args), first
    shifts = [jtu.tree_map(lambda x: 0 * x + prior_shift, _one(x)) for x in paths]
    divergence = jnp.zeros((), program.dtype)
    log_ratio = setting or None
    if name == "path_kl_of_shift":
        shift = lambda t, y, args: shifts[0] if len(shifts) == 1 else shifts
        converted = path_kl_of_shift(terms, shift, log_ratio=log_ratio)
    else:
        assert name == "path_kl"
        drift_term, *noise_terms = terms.terms

        def prior(t, y, args):
            # What the noise can make of the drift of the posterior.
            out = drift_term.prod(
                drift_term.vf(t, y, args), jnp.ones((), program.dtype)
            )
            for noise, shift in zip(noise_terms, shifts, strict=True):
                change = noise.prod(noise.vf(t, y, args), shift)
                out = jtu.tree_map(jnp.add, out, change)
            return out

        converted = path_kl(terms, prior, log_ratio=log_ratio)
    return converted, (y0, divergence), args, first


def first(y):
    return y[0]


def _one(path):
    return jtu.tree_map(lambda x: jnp.ones(x.shape, x.dtype), path.shape)


def _make_controller(program: Program, start, end):
    """And whether it takes a `dt0`."""
    dtype = program.dtype
    pid = diffrax.PIDController(
        rtol=1e-2,
        atol=1e-2,
        pcoeff=0.1,
        icoeff=0.3,
        dcoeff=0,
        dtmin=jnp.array(0.02, dtype),
    )
    match program.controller:
        case "constant":
            return diffrax.ConstantStepSize(), True
        case "step to":
            ts = jnp.linspace(0, 1, 9, dtype=dtype) ** 2
            return diffrax.StepTo(start + (end - start) * ts), False
        case name:
            return make_adaptive(name, pid, dtype)


def _make_event(program: Program, solution_of):
    of_state = lambda y: jnp.sum(jnp.real(jtu.tree_leaves(solution_of(y))[0]))
    rate_of = lambda args: args[0] if isinstance(args, tuple) else args
    match program.event:
        case None:
            return None
        case "boolean":
            return diffrax.Event(lambda t, y, args, **kwargs: of_state(y) > 0.6)
        case "float" | "root":
            root_finder = None
            if program.event == "root":
                root_finder = optx.Newton(1e-10, 1e-10, optx.rms_norm)
            return diffrax.Event(
                lambda t, y, args, **kwargs: (
                    of_state(y) - 1.5 * jnp.real(rate_of(args)["rate"])
                ),
                root_finder,
            )
        case _:
            raise AssertionError


def _make_saveat(program: Program, times, solution_of):
    def save_fn(t, y, args):
        args = args[0] if isinstance(args, tuple) else args
        y, *_ = jtu.tree_leaves(solution_of(y))
        t = jnp.asarray(t, y.dtype)
        return first_entry(t, y, args)

    saveat = make_saveat(program.saveat, times)
    if program.saveat in ("fn", "subs"):
        is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
        saveat = eqx.tree_at(
            lambda s: s.subs,
            saveat,
            jtu.tree_map(
                lambda sub: (
                    dataclasses.replace(sub, fn=save_fn)
                    if sub.fn is first_entry
                    else sub
                ),
                saveat.subs,
                is_leaf=is_sub,
            ),
        )
    if program.around == "scan":
        # Where the next solve starts.
        subs = {"saved": saveat.subs, "last": diffrax.SubSaveAt(t1=True)}
        saveat = diffrax.SaveAt(subs=subs, dense=saveat.dense)
    return saveat


def make_solve(program: Program, adjoint, solver):
    """A function of the inputs of a program, which returns the outputs of a solve, its
    last solution, and a record of its steps.
    """
    dtype = program.dtype
    has_levy_area = program.solver in with_levy_area
    levy_area = (
        diffrax.SpaceTimeLevyArea if has_levy_area else diffrax.BrownianIncrement
    )
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)

    def solve(x):
        params, record = x["params"], x["record"]
        empty = jnp.ones(0, program.y_dtype)
        *_, shape, _ = _on_state(program.state, program.noise, params, empty)
        noise_struct = jtu.tree_map(
            lambda s: struct(s, program.y_dtype), shape, is_leaf=is_shape
        )
        start, full_length, dt = x["times"]
        end = start + full_length * x["length"]
        if "t1 of the path too" in program.cells:
            path_ends = jnp.minimum(start, end), jnp.maximum(start, end)
        else:
            path_ends = jnp.array(0, dtype), jnp.array(1, dtype)
        path_dt = lax.stop_gradient(jnp.abs(dt)) if "steps" in program.cells else None
        key = jr.fold_in(jr.key(x["seed"]), x["index"])
        paths = [
            BrownianInterval(
                *path_ends,
                noise_struct,
                jr.fold_in(key, i),
                dt=path_dt,
                levy_area=levy_area,
            )
            for i in range(0 if program.noise == "none" else program.num_noises)
        ]
        terms = _make_terms(program, params, paths, empty)
        terms, y0, args, solution_of = _convert(
            program, terms, x["y0"], x["args"], paths, params["shift"]
        )
        controller, has_dt0 = _make_controller(program, start, end)
        if record is not None:
            controller = Repeating(record)
        elif program.is_recorded:
            controller = Recording(controller, program.max_steps or 100)
        save_times = start + full_length * x["length"] * x["fractions"]
        if not program.differentiate_ts:
            save_times = lax.stop_gradient(save_times)
        saveat = eqx.tree_at(
            lambda s: s.controller_state,
            _make_saveat(program, save_times, solution_of),
            program.is_recorded,
        )
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            start,
            end,
            dt if has_dt0 else None,
            y0,
            args,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            event=_make_event(program, solution_of),
            max_steps=program.max_steps,
            # An incomplete solve is a result too, and so are the steps of a record that
            # a conditional has not made.
            throw=program.max_steps != 5 and program.around != "cond",
        )
        out, last = sol.ys, None
        if program.around == "scan":
            assert isinstance(out, dict)
            last = jtu.tree_map(lambda x: x[0], solution_of(out["last"]))
            out = out["saved"]
        if program.saveat == "dense":
            at = lambda i: start + full_length * x["length"] * [0.3, 0.05][i]
            at = lambda i, at=at: lax.stop_gradient(at(i))
            out = (out, sol.evaluate(at(0)), sol.derivative(at(1)))
        if program.event == "root" or (
            program.differentiate_times and program.is_adaptive
        ):
            out = (out, sol.ts)
        if program.is_recorded and record is None:
            assert sol.controller_state is not None
            *_, record = sol.controller_state
        return out, last, record

    return solve


def _with_surroundings(solve, around: str | None, is_outside: bool):
    match around:
        case None:
            return solve
        case "checkpoint":
            return eqx.filter_checkpoint(solve)
        case "cond":

            def either(x):
                x, others = eqx.partition(x, eqx.is_array)
                run = lambda x: eqx.filter(solve(eqx.combine(x, others)), eqx.is_array)
                zeros = lambda x: jtu.tree_map(
                    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, x)
                )
                is_on = x["is_on"]
                if not is_outside:
                    # In a batch of keys, one for each element.
                    is_on = is_on & (x["seed"] % 2 == 0)
                return lax.cond(is_on, run, zeros, x)

            return either
        case "scan":

            def scan(x):
                def step(y0, this):
                    index, record = this
                    out, last, record = solve(
                        {**x, "index": index, "record": record, "y0": y0}
                    )
                    return last, (out, record)

                indices = jnp.arange(2)
                _, (out, record) = lax.scan(step, x["y0"], (indices, x["record"]))
                return out, None, record

            return scan
        case _:
            raise AssertionError


def _spread(name: str, batch: str, x):
    """Different values of an input along a new first axis."""
    along = lambda values, x: jnp.asarray(values, x.dtype).reshape(
        -1, *[1 for _ in x.shape]
    )
    if name == "seed":
        size = 3 if batch == "t1, also t0" else 2
        return 5 * x + along(range(size), x)
    if name in ("y0", "args"):
        return jtu.tree_map(lambda x: x + along([0, 0.25], x), x)
    if name == "length":
        lengths = [1, 0.55, 0] if batch == "t1, also t0" else [1, 0.55]
        return x * along(lengths, x)
    assert name == "fractions"
    return x * along([1, 0.6], x)


def make_loss(program: Program, adjoint, solver):
    """A function of the inputs that are differentiated, and of a record of steps. It
    also returns which outputs are finite, and the record.
    """
    run = make_solve(program, adjoint, solver)
    if not program.is_outside:
        run = _with_surroundings(run, program.around, program.is_outside)
    names = [*_initial(program), "params", "times", "index", "is_on", "record"]
    for batch in reversed(program.batches):
        axes = {
            x: 0 if x == "record" or x in _inputs_of(program, batch) else None
            for x in names
        }
        run = jax.vmap(run, in_axes=(axes,))
    if program.is_outside:
        run = _with_surroundings(run, program.around, program.is_outside)

    def loss(inputs, record):
        x = {**_initial(program), **inputs}
        # From the innermost batch outwards, as the axes of outer ones come first.
        for batch in reversed(program.batches):
            for name in _inputs_of(program, batch):
                x[name] = _spread(name, batch, x[name])
        x["record"] = record
        x["index"] = jnp.array(0)
        x["is_on"] = jnp.real(x["params"]["shift"]) > 0
        x["times"] = (
            x["times"] if program.differentiate_times else lax.stop_gradient(x["times"])
        )
        out, _, record = run(x)
        leaves = [
            jnp.stack([jnp.real(x), jnp.imag(x)]).astype(jnp.float64).ravel()
            for x in jtu.tree_leaves(out)
        ]
        out = jnp.concatenate(leaves)
        is_finite = jnp.isfinite(out)
        out = jnp.where(is_finite, out, 0)
        value = jnp.sum(jnp.cos(1 + jnp.arange(out.size)) * (out + out**2))
        return value, (is_finite, record)

    return loss


def _initial(program: Program) -> dict[str, Any]:
    """The inputs of a program, before any is batched."""
    array = lambda x: jnp.array(x, program.y_dtype)
    params = dict(
        weight=array([[0.5, -0.8], [0.9, 0.3]]),
        scale=array([0.7, -0.4]),
        y0=array([0.6, -0.3]),
        shift=array(0.4),
    )
    if program.state == "complex":
        params["y0"] = params["y0"] * (1 + 0.5j)
    empty = jnp.ones(0, program.y_dtype)
    *_, y0 = _on_state(program.state, "general", params, empty)
    times = [1, -1, -0.1] if program.backward else [0, 1, 0.1]
    return dict(
        seed=jnp.array(0),
        y0=y0,
        args=dict(rate=array(0.3), level=array(0.5)),
        length=jnp.array(1, program.dtype),
        fractions=jnp.array([0.0, 0.05, 0.3, 0.31, 0.31, 0.9, 1.0], program.dtype),
        params=params,
        times=jnp.array(times, program.dtype),
    )


def value_and_grad(program: Program, solver, of: Callable, record=None):
    """Of the loss as a function of inputs and adjoint, by `of(loss, inputs)`; with
    which outputs are finite, and a record of the steps.
    """
    names = ["y0", "args", "params", "times", "fractions"]
    inputs = {name: _initial(program)[name] for name in names}
    loss = lambda x, adjoint: make_loss(program, adjoint, solver)(x, record)
    (value, (is_finite, record)), grads = of(loss, inputs)
    leaves = [jnp.ravel(x).astype(jnp.complex128) for x in jtu.tree_leaves(grads)]
    return value, is_finite, jnp.concatenate(leaves), record


def ours(program: Program):
    adjoint = StochasticAdjoint(program.checkpoint_every, program.store_all)
    of = lambda loss, inputs: eqx.filter_jit(
        eqx.filter_value_and_grad(loss, has_aux=True)
    )(inputs, adjoint)
    return value_and_grad(program, solvers[program.solver], of)


def theirs(program: Program, record):
    solver = solvers[program.solver]
    if type(solver) is diffrax.ReversibleHeun:
        # Which `StochasticAdjoint` replaces. They differ where diffrax's is wrong.
        solver = ReversibleHeun()
    of = lambda loss, inputs: reference_value_and_grad(loss, inputs, solver)
    return value_and_grad(program, solver, of, record)


def assert_equal(program: Program, actual, expected):
    value, is_finite, grads, _ = actual
    expected_value, expected_is_finite, expected_grads, _ = expected
    tol = 1e-9 if program.dtype == jnp.float64 else 1e-3
    np.testing.assert_array_equal(is_finite, expected_is_finite)
    np.testing.assert_allclose(value, expected_value, rtol=tol)
    if program.solver in near_exact:
        tol = 2e-2
    scale = np.max(np.abs(expected_grads))
    np.testing.assert_allclose(grads, expected_grads, rtol=0, atol=tol * scale)
