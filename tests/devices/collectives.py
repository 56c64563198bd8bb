"""Where devices talk to one another in a compiled program."""

import re


_collective = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(hlo: str) -> tuple[list[str], list[str]]:
    """The names of those in loops, and of the others."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            current = bodies.setdefault(header[1], [])
        elif line.startswith(" "):
            current.append(line)
    in_loops = {
        name
        for body in bodies.values()
        for line in body
        if " while(" in line
        for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
    }
    to_visit = list(in_loops)
    while to_visit:
        for line in bodies[to_visit.pop()]:
            called = set(re.findall(r"%([\w.\-]+)", line)) & bodies.keys() - in_loops
            in_loops |= called
            to_visit.extend(called)

    def found(names):
        lines = (line for name in names for line in bodies[name])
        return [match[1] for line in lines if (match := _collective.search(line))]

    return found(in_loops), found(bodies.keys() - in_loops)
