"""Timing several functions against one another.

What a benchmark asserts is a ratio, and the machine it runs on may be shared. So the
functions that are compared take turns, in many short runs, and each is represented by
its fastest run: a disturbance lengthens single runs, of whichever function, and a
change of the processor's clock reaches all of them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


_min_rounds = 3


def interleaved_minima(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 3.0,
    rounds: int = 300,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The fastest run of each function, in seconds.

    They are run in turns, `rounds` times. A function that has had `seconds` to itself
    (and three runs) drops out, so that slow ones need not be run as often as fast ones.
    Their first runs, which compile, are not counted.

    `clock` may be `time.process_time` for functions that use one core only: this leaves
    out the time that the core was given to another process, which a run that takes
    longer than the slice of time that it is given never does without.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    fastest = dict.fromkeys(functions, float("inf"))
    spent = dict.fromkeys(functions, 0.0)
    for i in range(rounds):
        for name, function in functions.items():
            if i >= _min_rounds and spent[name] >= seconds:
                continue
            start = clock()
            jax.block_until_ready(function())
            elapsed = clock() - start
            fastest[name] = min(fastest[name], elapsed)
            spent[name] += elapsed
    return fastest
