"""What is assumed of the private parts of diffrax, equinox and JAX.

Each test says in one sentence what has changed, if it fails. The last ones look for
private names that are used elsewhere than in `_compat.py`.
"""

import ast
import dataclasses
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import diffrax_sde_adjoint
import diffrax_sde_adjoint._compat as compat


def names(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name", ("Args", "BoolScalarLike", "DenseInfo", "RealScalarLike", "Y")
)
def test_annotations(name):
    step = diffrax.AbstractSolver.step.__annotations__
    used = str([*step.values(), *diffrax.AbstractSolver.func.__annotations__.values()])
    assert str(getattr(compat, name)) in used, (
        f"diffrax no longer annotates its solvers with `_custom_types.{name}`."
    )


def test_is_unsafe_sde():
    unsafe = diffrax.UnsafeBrownianPath((), jr.key(0))
    safe = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.key(0))
    term = lambda path: diffrax.ControlTerm(lambda t, y, args: y, path)
    ode = diffrax.ODETerm(lambda t, y, args: y)
    found = [
        compat.is_unsafe_sde(diffrax.MultiTerm(ode, term(path)))
        for path in (unsafe, safe)
    ]
    assert found == [True, False], (
        "diffrax's `_heuristics.is_unsafe_sde` no longer finds `UnsafeBrownianPath`s."
    )


def test_is_sde():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.key(0))
    ode = diffrax.ODETerm(lambda t, y, args: y)
    sde = diffrax.ControlTerm(lambda t, y, args: y, path)
    assert [compat.is_sde(x) for x in (ode, sde)] == [False, True], (
        "diffrax's `_heuristics.is_sde` no longer finds Brownian paths."
    )


def test_state():
    fields = {field.name for field in dataclasses.fields(compat.State)}
    needed = {
        "y",
        "tprev",
        "tnext",
        "made_jump",
        "solver_state",
        "controller_state",
        "save_state",
        "num_steps",
        "num_accepted_steps",
        "dense_ts",
        "dense_infos",
        "dense_save_index",
        "event_tprev",
        "event_tnext",
        "event_dense_info",
    }
    assert needed <= fields, (
        f"diffrax's `_integrate.State` no longer has {needed - fields}."
    )


def test_save_state():
    fields = {field.name for field in dataclasses.fields(compat.SaveState)}
    needed = {"saveat_ts_index", "ts", "ys", "save_index"}
    assert needed <= fields, (
        f"diffrax's `_integrate.SaveState` no longer has {needed - fields}."
    )


def test_prevbefore():
    x = compat.prevbefore(jnp.array(1.0))
    assert x == jnp.nextafter(1.0, -jnp.inf), (
        "equinox's `internal.prevbefore` is no longer the number just below."
    )


def test_loop():
    """The adjoint gets, and passes on, all arguments of the integration loop."""
    got = {}

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, **kwargs):
            got.update(kwargs)
            return diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)

    diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.Heun(),
        0.0,
        1.0,
        0.1,
        1.0,
        adjoint=Adjoint(),
    )
    of_loop = names(Adjoint()._loop) - {"inner_while_loop", "outer_while_loop"}
    of_adjoint = {"throw", "passed_solver_state", "passed_controller_state"}
    assert set(got) == of_loop | of_adjoint, (
        "diffrax's `AbstractAdjoint.loop` is called with other arguments than before: "
        f"{set(got) ^ (of_loop | of_adjoint)}."
    )
    assert isinstance(got["init_state"], compat.State), (
        "diffrax's integration loop no longer starts from an `_integrate.State`."
    )
    assert got["init_state"].made_jump is False, (
        "diffrax no longer starts a solve with a `made_jump` that is known to be False."
    )
    assert isinstance(got["init_state"].save_state, compat.SaveState), (
        "diffrax's integration loop no longer keeps what it saves in a `SaveState`."
    )


def test_wrap_term():
    ode = diffrax.ODETerm(lambda t, y, args: y)
    assert compat.WrapTerm(ode, 1).term is ode, (
        "diffrax's `_term.WrapTerm` no longer holds a `term`."
    )


def test_save_y():
    assert diffrax.SubSaveAt(t1=True).fn is compat.save_y, (
        "diffrax's `_saveat.save_y` is no longer the default of `SaveAt(fn=...)`."
    )


def test_while_loop():
    assert {"max_steps", "buffers", "kind"} <= names(compat.while_loop), (
        "equinox's `internal.while_loop` has lost one of the arguments that we pass."
    )
    total = compat.while_loop(
        lambda x: x < 10, lambda x: x + 3, jnp.array(0), kind="lax"
    )
    assert total == 12, "equinox's `internal.while_loop(kind='lax')` does not loop."


def test_nondifferentiable():
    for function, message in (
        (compat.nondifferentiable, "`nondifferentiable`"),
        (compat.nondifferentiable_backward, "`nondifferentiable_backward`"),
    ):
        with pytest.raises(RuntimeError, match="the name"):
            jax.grad(lambda x, f=function: f(x, name="the name"))(1.0)
            pytest.fail(f"equinox's {message} no longer raises.")


def test_control_of_solver():
    asked = []

    class Path(diffrax.AbstractPath):
        t0: float = 0.0
        t1: float = 1.0

        def evaluate(self, t0, t1=None, left=True, use_levy=False):
            if use_levy:
                asked.append(compat.control_of_solver())
            raise ZeroDivisionError

    term = lambda control: diffrax.ControlTerm(lambda t, y, args: y, control)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: y), term(Path()))
    with pytest.raises(ZeroDivisionError):
        diffrax.diffeqsolve(terms, diffrax.SPaRK(), 0.0, 1.0, 0.1, jnp.array(1.0))
    assert asked == [diffrax.AbstractSpaceTimeLevyArea], (
        "diffrax's check of terms, in `_integrate._assert_term_compatible`, no longer "
        "asks for a control in a function `_check` with a variable "
        "`control_type_expected`."
    )
    assert compat.control_of_solver() is None


@pytest.mark.skipif(
    jax.__version_info__ < (0, 7),
    reason="JAX 0.6 does not keep what a traced array was computed from.",
)
def test_known_value():
    found = []

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, *, t0, t1, dt0, terms, **kwargs):
            found.append(
                [compat.known_value(x) for x in (t0, t1, dt0, terms.direction)]
            )
            raise ZeroDivisionError

    def solve(t0, t1, dt0):
        term = diffrax.ODETerm(lambda t, y, args: y)
        diffrax.diffeqsolve(
            term, diffrax.Euler(), t0, t1, dt0, jnp.array(1.0), adjoint=Adjoint()
        )

    for fn in (solve, lambda *times: jax.jit(lambda: solve(*times))()):
        with pytest.raises(ZeroDivisionError):
            fn(1.0, 0, -0.25)
        with pytest.raises(ZeroDivisionError):
            fn(0.0, jnp.array(1.0), 0.25)
    known, unknown, *_ = found
    assert known == [-1, 0, 0.25, -1], (
        "JAX no longer keeps what a traced array was computed from as its `parent`, "
        "with `in_tracers`, `primitive`, `params` and `outvars`."
    )
    assert unknown[1] is None


def test_unvmap_any():
    fn = lambda x: (x, compat.unvmap_any(x))
    _, out = jax.vmap(fn, out_axes=(0, None))(jnp.array([False, True]))
    assert out.shape == () and out, (
        "equinox's `internal.unvmap_any` is no longer whether any of a batch is true."
    )


def test_direction():
    assert "direction" in {x.name for x in dataclasses.fields(compat.WrapTerm)}, (
        "diffrax's `_term.WrapTerm` no longer has a field `direction`."
    )
    found = []

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, *, terms, **kwargs):
            found.append(compat.direction_of(terms))
            return diffrax.RecursiveCheckpointAdjoint().loop(terms=terms, **kwargs)

    for t0, t1, dt0 in ((0.0, 1.0, 0.5), (1.0, 0.0, -0.5)):
        term = diffrax.ODETerm(lambda t, y, args: y)
        with jax.disable_jit():
            diffrax.diffeqsolve(
                term, diffrax.Euler(), t0, t1, dt0, jnp.array(1.0), adjoint=Adjoint()
            )
    assert found == [1, -1], (
        "diffrax's `_term.WrapTerm.direction` is no longer 1 forward in time and -1 "
        "backward."
    )
    annotation = compat.WrapTerm.__annotations__["direction"]
    assert str(annotation) == str(compat.IntScalarLike), (
        "diffrax no longer annotates `WrapTerm.direction` with "
        "`_custom_types.IntScalarLike`."
    )


def test_integration_loop():
    """An adjoint of a user's, with loops of its own, makes the steps of diffrax's."""
    num_loops = []

    def while_loop(*args, checkpoints=None, **kwargs):
        num_loops.append(1)
        return compat.while_loop(*args, kind="lax", **kwargs)

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, **kwargs):
            of_adjoint = {"throw", "passed_solver_state", "passed_controller_state"}
            kwargs = {k: v for k, v in kwargs.items() if k not in of_adjoint}
            return compat.integration_loop(
                self,
                inner_while_loop=while_loop,
                outer_while_loop=while_loop,
                **kwargs,
            )

    solve = lambda adjoint: diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.Heun(),
        0.0,
        1.0,
        0.1,
        jnp.array(1.0),
        adjoint=adjoint,
    )
    actual = solve(Adjoint()).ys
    expected = solve(diffrax.DirectAdjoint()).ys
    # Up to rounding: the two loops may be compiled differently.
    assert len(num_loops) > 0 and jnp.allclose(actual, expected, rtol=1e-12), (
        "diffrax's `AbstractAdjoint._loop` no longer makes a solve with the loops that "
        "it is given."
    )


def test_contr_kwargs():
    for solver, expected in (
        (diffrax.SPaRK(), [{}, {"use_levy": True}]),
        (diffrax.HalfSolver(diffrax.SPaRK()), [{}, {"use_levy": True}]),
        (diffrax.Euler(), [{}]),
    ):
        kwargs = solver.term_compatible_contr_kwargs
        is_leaf = lambda x: isinstance(x, dict)
        assert jax.tree_util.tree_leaves(kwargs, is_leaf=is_leaf) == expected, (
            "diffrax's `AbstractSolver.term_compatible_contr_kwargs` is no longer what "
            f"`{type(solver).__name__}` passes to its terms."
        )


def test_with_scan_kind():
    for solver, message in (
        (diffrax.Tsit5(), "`AbstractRungeKutta`"),
        (diffrax.SPaRK(), "`AbstractSRK`"),
    ):
        assert getattr(solver, "scan_kind", "none") is None, (
            f"diffrax's {message} no longer has a field `scan_kind` that is `None`."
        )
        changed = compat.with_scan_kind(solver, {None: "lax"})
        assert changed.scan_kind == "lax"
        assert compat.with_scan_kind(changed, {None: "bounded"}).scan_kind == "lax"


def test_names_of_wrapped_solvers():
    """Solvers around another one pass these on under the same names."""
    assert "root_find_max_steps" in names(diffrax.Kvaerno3), (
        "diffrax's `AbstractImplicitSolver` no longer has `root_find_max_steps`."
    )


def test_num_constant_steps():
    message = (
        "The second part of the state that diffrax's `ConstantStepSize` starts with is "
        "no longer the number of its steps."
    )
    times = [np.asarray(x) for x in (0.0, 1.0, 0.1)]
    assert compat.num_constant_steps(diffrax.ConstantStepSize(), *times) == 10, message


def test_callback_log():
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Handler()
    fail = jax.jit(lambda x: eqx.error_if(x, x > 0, "the message"))
    compat.callback_log.addHandler(handler)
    try:
        # JAX may raise it only where the value is waited for.
        with pytest.raises(Exception, match="the message"):
            jax.block_until_ready(fail(1.0))
    finally:
        compat.callback_log.removeHandler(handler)
    errors = [record.exc_info[1] for record in records if record.exc_info]
    assert len(errors) > 0, (
        "JAX no longer tells of an error in a callback in its log `jax._src.callback`."
    )
    assert isinstance(errors[0], compat._EquinoxRuntimeError), (
        "equinox no longer raises an `_errors._EquinoxRuntimeError` in a callback."
    )


def make_primitive(**rules):
    primitive = compat.make_primitive(
        "scale",
        multiple_results=False,
        impl=lambda x, *, by: by * x,
        abstract_eval=lambda x, *, by: x,
        batch=lambda xs, dims, *, by: (primitive.bind(*xs, by=by), dims[0]),
        **rules,
    )
    return lambda x: primitive.bind(x, by=2.0)


def test_make_primitive():
    def jvp(primals, tangents, *, by):
        (x,), (t,) = primals, tangents
        return by * x, 7 * t

    def transpose(cotangent, _, *, by):
        return [5 * cotangent]

    one = jnp.array(1.0)
    for rules, tangent, cotangent in (
        ({"jvp": jvp}, 7, 7),
        ({"transpose": transpose}, 2, 5),
    ):
        scale = make_primitive(**rules)
        assert [scale(one), jax.jit(scale)(one)] == [2, 2], (
            "JAX no longer lowers a primitive by `interpreters.mlir.register_lowering` "
            "and `lower_fun`."
        )
        assert jnp.array_equal(jax.vmap(scale)(jnp.ones(3)), jnp.full(3, 2.0)), (
            "JAX no longer batches a primitive by "
            "`interpreters.batching.primitive_batchers`."
        )
        _, tangent_out = jax.jvp(scale, (one,), (one,))
        assert (tangent_out, jax.grad(scale)(one)) == (tangent, cotangent), (
            "JAX no longer differentiates a primitive by "
            "`interpreters.ad.primitive_jvps` and `deflinear2`."
        )


def test_bind():
    """Also of equations that have functions among their parameters."""

    def fn(x):
        return jax.lax.scan(lambda y, _: (jax.nn.relu(x - y), None), x, length=2)[0]

    (*_, equation) = jax.make_jaxpr(fn)(0.5).jaxpr.eqns
    values = [jnp.asarray(0.5) for _ in equation.invars]
    with compat.in_context_of(equation):
        out = compat.bind(equation, values)
    assert len(out) == len(equation.outvars) and out[0] == 0.5, (
        "An equation of a jaxpr is no longer evaluated by `primitive.bind` with "
        "`primitive.get_bind_params(equation.params)` in `equation.ctx.manager`."
    )


def test_symbolic_zero():
    """A rule is told of tangents that are zero, and may say that one is."""
    found = []

    def jvp(primals, tangents):
        found.append([compat.is_symbolic_zero(t) for t in tangents])
        return list(primals), [compat.symbolic_zero(x) for x in primals]

    primitive = compat.make_primitive(
        "first",
        impl=lambda *x: list(x),
        abstract_eval=lambda *x: list(x),
        batch=lambda xs, dims: (primitive.bind(*xs), dims),
        jvp=jvp,
    )
    fn = lambda x: primitive.bind(x, jnp.arange(3), np.ones(2))[0]
    primal, tangent = jax.jvp(fn, (jnp.array(3.0),), (jnp.array(1.0),))
    assert found == [[False, True, True]], (
        "JAX no longer tells a rule of a tangent that is zero by an "
        "`interpreters.ad.Zero`."
    )
    assert (primal, tangent) == (3, 0), (
        "JAX no longer takes an `interpreters.ad.Zero` of "
        "`jax.typeof(x).to_tangent_aval()` for a tangent that is zero."
    )


# Whose private names are looked for.
others = ("diffrax", "equinox", "jax", "jaxlib", "jaxtyping", "lineax", "optimistix")
# Modules and attributes that are private, or not documented, without an underscore.
undocumented_modules = ("equinox.internal", "jax.interpreters")
undocumented_attributes = ("direction", "in_tracers", "to_tangent_aval")


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[^_].*", name) is not None


def is_others(path: str) -> bool:
    """Whether a dotted path leads to something private of a package that we use."""
    first, *rest = path.split(".")
    return first in others and (
        any(map(is_private, rest))
        or any(f"{path}.".startswith(f"{x}.") for x in undocumented_modules)
    )


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """The names of modules, functions and classes, of what is assigned in these or at
    the top of a module, and of attributes that are assigned.
    """
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign | ast.AnnAssign):
                    found |= {
                        x.id
                        for x in ast.walk(statement)
                        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
                    }
    return found


def private_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """The lines at which something private of others is used, and what it is. An
    attribute with an underscore that is not among `own` is taken for theirs.
    """
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [(x.asname or x.name.split(".")[0], x.name) for x in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            paths = [
                (x.asname or x.name, f"{node.module}.{x.name}") for x in node.names
            ]
        else:
            continue
        for name, path in paths:
            # `import a.b` binds `a`, and `import a.b as c` the module within.
            aliases[name] = path if name != path.split(".")[0] else name
            if is_others(path):
                yield node.lineno, path

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return aliases.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_foreign = is_private(node.attr) and node.attr not in own
            if (
                is_foreign
                or node.attr in undocumented_attributes
                or is_others(dotted(node))
            ):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As for `importlib`, `logging` and `getattr`.
            name = node.value
            is_foreign = name.isidentifier() and is_private(name) and name not in own
            if is_foreign or name in undocumented_attributes or is_others(name):
                yield node.lineno, name


def test_private_names_are_used_in_one_file():
    package = Path(diffrax_sde_adjoint.__file__).parent
    trees = {path: ast.parse(path.read_text()) for path in package.rglob("*.py")}
    # With an underscore too, these are the names of modules.
    modules = {part for path in trees for part in path.relative_to(package).parts}
    own = own_names(trees.values()) | {x.removesuffix(".py") for x in modules}
    found = [
        f"{path.relative_to(package)}, line {line}: `{name}`"
        for path, tree in trees.items()
        if path.name != "_compat.py"
        for line, name in private_names(tree, own)
    ]
    assert found == [], (
        "A private name of another package is used elsewhere than in `_compat.py`."
    )


@pytest.mark.parametrize(
    "source,found",
    [
        ("self._loop(args=args)", "self._loop"),
        ("from jax.interpreters import ad", "jax.interpreters.ad"),
        ("from jax import interpreters", "jax.interpreters"),
        ("import jax.interpreters.mlir as m", "jax.interpreters.mlir"),
        ("import jax\njax.interpreters.ad.Zero", "jax.interpreters"),
        ("import equinox as eqx\neqx.internal.while_loop(f)", "eqx.internal"),
        ("from equinox import internal as eqxi", "equinox.internal"),
        ("import equinox.internal as eqxi", "equinox.internal"),
        ("import diffrax._term", "diffrax._term"),
        ("from diffrax._term import WrapTerm", "diffrax._term.WrapTerm"),
        ("from diffrax import _term", "diffrax._term"),
        ("def f():\n    from lineax._operator import x", "lineax._operator.x"),
        ("x._src", "x._src"),
        ("f(x)[0]._trace.main", "f(x)[0]._trace"),
        ("term.direction", "term.direction"),
        ("getattr(adjoint, '_loop')", "_loop"),
        ("logging.getLogger('jax._src.callback')", "jax._src.callback"),
    ],
)
def test_private_names_are_found(source, found):
    assert found in [name for _, name in private_names(ast.parse(source), set())]


@pytest.mark.parametrize(
    "source",
    [
        "import jax.extend as jex\njex.core.Primitive('p')",
        "import equinox as eqx\neqx.filter_jit(f)",
        "from .._compat import while_loop\nwhile_loop(cond, body, init)",
        "from jax import lax\nlax.internal",
        "x.__doc__",
        "class A:\n    _num: int\n    def f(self):\n        return self._num",
        "class A:\n    def _f(self):\n        self._x = 1\nA()._f()\na._x",
        "for _ in range(3): pass",
        "'`jax._src.core`, which is private.'",
        "internal.loop",
    ],
)
def test_other_names_are_not_found(source):
    tree = ast.parse(source)
    assert list(private_names(tree, own_names([tree]))) == []


def test_local_variables_are_not_attributes():
    tree = ast.parse("def f(adjoint):\n    _loop = 1\n    return adjoint._loop")
    assert [name for _, name in private_names(tree, own_names([tree]))] == [
        "adjoint._loop"
    ]
