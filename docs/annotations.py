"""Signatures in the API pages have types as they are written in the source, such as
`RealScalarLike`, and not the union that it stands for, which is what the imported
package knows.
"""

import ast
import inspect
import textwrap

import griffe


_modules = {"diffrax"}  # of names that are links


class WrittenAnnotations(griffe.Extension):
    """Called by griffe; see `extensions` in `mkdocs.yml`."""

    def on_function_instance(self, *, node, func, **kwargs):
        if isinstance(node, ast.AST):
            return
        annotations = _of_function(node.obj)
        if annotations is None and func.name == "__init__":
            annotations = _of_fields(node.parent.obj)
        for name, annotation in (annotations or {}).items():
            if annotation is None:
                continue
            written = _written(annotation, func)
            if name == "return":
                func.returns = written
            elif name in func.parameters:
                func.parameters[name].annotation = written


def _parse(x: object) -> ast.stmt | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(x))).body[0]  # pyright: ignore
    except (OSError, TypeError, SyntaxError):
        return None


def _of_function(function) -> dict[str, ast.expr | None] | None:
    tree = _parse(inspect.unwrap(function))
    if not isinstance(tree, ast.FunctionDef):
        return None
    arguments = [x for x in ast.walk(tree.args) if isinstance(x, ast.arg)]
    return {x.arg: x.annotation for x in arguments} | {"return": tree.returns}


def _of_fields(cls) -> dict[str, ast.expr] | None:
    """Of an `__init__` that is made from the fields of a class."""
    tree = _parse(cls)
    if not isinstance(tree, ast.ClassDef):
        return None
    fields = [x for x in tree.body if isinstance(x, ast.AnnAssign)]
    return {ast.unparse(x.target): x.annotation for x in fields}


def _written(annotation: ast.expr, func: griffe.Function):
    out = griffe.safe_get_annotation(annotation, parent=func.parent)  # pyright: ignore
    if not isinstance(out, griffe.Expr):
        return out
    for name in (out, *out.iterate()):
        if isinstance(name, griffe.ExprName):
            # It may be an alias, for which griffe would write what it stands for.
            if name.name not in _modules and not isinstance(name.parent, griffe.Expr):
                name.parent = None
            name.name = name.name.lstrip("_")
    return out
