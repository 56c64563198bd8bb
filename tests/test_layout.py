"""Rooms of the package import from those below them only."""

import ast
from pathlib import Path

import diffrax_sde_adjoint


package = Path(diffrax_sde_adjoint.__file__).parent
# From the top floor to the ground.
floors = (
    "__init__",
    "_adjoint",
    "_backward_sde",
    "_sweep",
    "_transform",
    "_forward",
    "_solver",
    "_term",
    "_brownian",
    "_autodiff",
    "_misc",
    "_compat",
    "_lipschitz",
    "_score",
)


def room(path: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports from."""
    depth = len(path.relative_to(package).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            name = node.module or node.names[0].name
            rooms.add(name.split(".")[0])
    return rooms


def test_every_room_has_a_floor():
    rooms = {room(path) for path in package.rglob("*.py")}
    assert rooms == set(floors)


def test_imports_run_downwards():
    upwards = [
        f"{path.relative_to(package)} imports from {name}"
        for path in package.rglob("*.py")
        for name in imported_rooms(path)
        if floors.index(name) <= floors.index(room(path))
    ]
    assert upwards == []
