"""The record of a loop that is no solve, whose steps are given by hand."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_sde_adjoint._compat import State
from diffrax_sde_adjoint._forward.tape import (
    SolveState,
    Tape,
    loop_and_record,
    plain_while_loop,
)


class Attempts(eqx.Module):
    """The steps that a loop tries to make, accepted or not."""

    t0: jax.Array
    t1: jax.Array
    made_jump: jax.Array
    is_accepted: jax.Array
    num: jax.Array


def make_attempts(accepted: str, gaps: bool = False) -> Attempts:
    """Steps of different sizes, of which those with a letter are accepted: `o`, or `j`
    if it comes after a jump, for which its attempts are known to. What is rejected
    (`.`) would have been longer. There may be `gaps` between steps.
    """
    rows, t, is_next = [], 0.25, {}
    for i in reversed(range(len(accepted))):
        is_next[i] = accepted[i] if accepted[i] != "." else is_next.get(i + 1, "o")
    for i, letter in enumerate(accepted):
        t0 = t + (0.01 * (i + 1) if gaps else 0.0)
        t1 = t0 + 0.1 * (1 + i % 3) * (1 if letter != "." else 2)
        rows.append((t0, t1, is_next[i] == "j", letter != "."))
        if letter != ".":
            t = t1
    # What comes after the last step is never looked at by a loop that ends in time.
    rows += (13 - len(rows)) * [(t, np.nan, False, True)]
    t0, t1, made_jump, is_accepted = map(np.array, zip(*rows, strict=True))
    attempts = Attempts(t0, t1, made_jump, is_accepted, np.array(len(accepted)))
    return jtu.tree_map(jnp.asarray, attempts)


def solution(num_accepted):
    """Some that goes up and down, and which rejected steps do not change."""
    y = np.sin(2.0 * np.arange(13))[:, None] * np.array([1.0, -2.0])
    z = np.cos(1.0 + np.arange(13))
    at = lambda x: jnp.array(x)[num_accepted]
    return {"y": at(y), "z": at(z)}, at(-z)


def run(
    attempts,
    may_have_gaps,
    snapshot_every,
    steps_per_page=3,
    max_steps=12,
    num_steps=None,
):
    """The final state and the tape."""
    at = lambda i: (attempts.t0[i], attempts.t1[i], attempts.made_jump[i])

    def state_after(num_steps, num_accepted):
        t0, t1, made_jump = at(num_steps)
        y, solver_state = solution(num_accepted)
        none = {name: None for name in State.__dataclass_fields__}
        return State(
            **none
            | dict(
                y=y,
                solver_state=solver_state,
                tprev=t0,
                tnext=t1,
                made_jump=made_jump,
                num_steps=num_steps,
                num_accepted_steps=num_accepted,
                result=diffrax.RESULTS.successful,
            )
        )

    def body(state):
        is_accepted = attempts.is_accepted[state.num_steps]
        num_accepted = state.num_accepted_steps + jnp.where(is_accepted, 1, 0)
        return state_after(state.num_steps + 1, num_accepted)

    return loop_and_record(
        lambda state: state.num_steps < attempts.num,
        body,
        state_after(jnp.array(0), jnp.array(0)),
        max_steps=max_steps,
        buffers=lambda state: (),
        steps_per_page=steps_per_page,
        may_have_gaps=may_have_gaps,
        snapshot_every=snapshot_every,
        num_steps=num_steps,
    )


run = eqx.filter_jit(run)


def assert_equal(x, y):
    jtu.tree_map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-15), x, y)


@eqx.filter_jit
def all_steps(tape, in_parts):
    parts_per_page = tape.parts_per_page if in_parts else 1

    def of_page(i):
        page = (tape.part if in_parts else tape.page)(i)
        is_page = i < tape.num_pages * parts_per_page
        step = lambda k: page.step(k, is_page & (k < page.num_steps))
        return jax.vmap(step)(jnp.arange(tape.steps_per_page))

    return jax.vmap(of_page)(jnp.arange(len(tape.ends) * parts_per_page))


def steps_on(tape, in_parts=False):
    """All steps of a tape, by its pages or by its parts."""
    tape = eqx.tree_at(lambda t: t.snapshots, tape, None, is_leaf=lambda x: x is None)
    steps = jtu.tree_map(np.asarray, all_steps(tape, in_parts))
    return jtu.tree_map(lambda x: x[steps.is_made], steps)


def assert_has(tape, accepted, attempts):
    """That the tape has the accepted steps, and nothing else."""
    indices = np.array([i for i, x in enumerate(accepted) if x != "."], int)
    steps = steps_on(tape)
    assert tape.num_steps == len(indices)
    np.testing.assert_array_equal(steps.index, np.arange(len(indices)))
    t0, t1 = attempts.t0[indices], attempts.t1[indices]
    np.testing.assert_array_equal(steps.t0, t0)
    np.testing.assert_array_equal(steps.t1, t1)
    # Before the first step, the solve is where the first attempt starts.
    prev_t1 = np.concatenate([attempts.t0[:1], t1])[: len(indices)]
    np.testing.assert_array_equal(steps.prev_t1, prev_t1)
    made_jump = [accepted[i] == "j" for i in indices]
    np.testing.assert_array_equal(steps.made_jump, made_jump)


without_gaps = ["", "o", "oo", "ooo", "oooo", "oooooo", "ooooooo"]
rejected = [".o", "o.", "oo.o", "ooo.", "ooo..", ".o..ooo.oo", "o.o.o.o."]
jumps = ["j", "oj", "ooj", "oooj", "jjjjjj", "oj.o", "oo.jo", "ooo.joo.jj"]


@pytest.mark.parametrize("accepted", without_gaps + rejected)
def test_steps(accepted):
    """Three a page: fewer, as many, and more; of one page and of two."""
    attempts = make_attempts(accepted)
    state, tape = run(attempts, may_have_gaps=False, snapshot_every=None)
    num_accepted = len(accepted.replace(".", ""))
    assert state.num_steps == len(accepted)
    assert state.num_accepted_steps == num_accepted
    assert tape.starts is None and tape.snapshots is None
    assert tape.ends.shape == (4, 4) and tape.steps_per_page == 3
    assert tape.num_pages == -(-num_accepted // 3)
    assert_has(tape, accepted, attempts)


@pytest.mark.parametrize("gaps", (False, True))
@pytest.mark.parametrize("accepted", without_gaps + rejected + jumps)
def test_steps_with_gaps(accepted, gaps):
    attempts = make_attempts(accepted, gaps)
    _, tape = run(attempts, may_have_gaps=True, snapshot_every=1)
    assert tape.starts is not None and tape.starts.shape == (4, 3)
    assert_has(tape, accepted, attempts)


def test_ends_of_a_step_after_a_jump_are_swapped():
    """But not where they are the start of a page."""
    attempts = make_attempts("ojjjo", gaps=True)
    _, tape = run(attempts, may_have_gaps=True, snapshot_every=1)
    is_swapped = tape.starts > tape.ends[:, 1:]
    np.testing.assert_array_equal(is_swapped[0], [False, True, True])
    np.testing.assert_array_equal(is_swapped[1, :2], [True, False])
    np.testing.assert_array_equal(tape.ends[1, 0], attempts.t1[2])


@pytest.mark.parametrize("steps_per_page", (1, 2, 5, 8))
def test_number_of_steps_is_bounded(steps_per_page):
    """The loop ends after five, of which four are accepted."""
    attempts = make_attempts("o.oooooo")
    state, tape = run(attempts, False, None, steps_per_page, max_steps=5)
    assert state.num_steps == 5
    assert tape.ends.shape == (-(-5 // steps_per_page), steps_per_page + 1)
    assert_has(tape, "o.ooo", attempts)


def test_snapshots():
    """Of the start of each page."""
    attempts = make_attempts(".oo.o.oo.oo")
    _, tape = run(attempts, may_have_gaps=True, snapshot_every=1)
    assert tape.num_pages == 3
    for i, num_accepted in enumerate((0, 3, 6)):
        snapshot = tape.page(jnp.array(i)).snapshot
        assert isinstance(snapshot, SolveState)
        assert_equal((snapshot.y, snapshot.solver_state), solution(num_accepted))


@pytest.mark.parametrize(
    "accepted,gaps,steps_per_page,snapshot_every",
    (
        ("oooooo", False, 1, None),
        ("oooooo", False, 1, 2),
        ("ooooooo", False, 1, 3),
        ("oooooo", False, 2, 2),
        ("oojooo", True, 3, 1),
        ("oojooo", True, 4, 1),
        ("oooooo", False, 7, None),
        ("o", False, 1, 1),
        ("o", False, 3, 1),
    ),
)
def test_known_number_of_steps(accepted, gaps, steps_per_page, snapshot_every):
    """The same tape, on pages that are full, or not all, and with fewer snapshots."""
    attempts, num = make_attempts(accepted, gaps), len(accepted)
    state, dense = run(attempts, gaps, 1, steps_per_page, num)
    known_state, tape = run(attempts, gaps, snapshot_every, steps_per_page, num, num)
    assert_equal(known_state.y, state.y)
    assert_equal(tape.largest_y, dense.largest_y)
    assert_equal(tape.largest_change, dense.largest_change)
    assert_equal(tape.ends[:, 0], dense.ends[:, 0])
    assert_has(tape, accepted, attempts)
    # At the start of every so many pages.
    some = jtu.tree_map(lambda x: x[:: snapshot_every or 1], dense.snapshots)
    assert_equal(tape.snapshots, None if snapshot_every is None else some)


@pytest.mark.parametrize("accepted", ("", "o", "oo", "o.ooo.oo"))
def test_largest_solution(accepted):
    """By entry, at any time: of the start, in between or at the end."""
    _, tape = run(make_attempts(accepted), may_have_gaps=False, snapshot_every=None)
    ys = [solution(num)[0] for num in range(len(accepted.replace(".", "")) + 1)]
    largest_y = jtu.tree_map(lambda *y: np.max(np.abs(np.array(y)), axis=0), *ys)
    assert_equal(tape.largest_y, largest_y)
    # That of the change at the ends of pages, of three steps each.
    at_pages = [*ys[::3], ys[-1]]
    largest_change = jtu.tree_map(
        lambda *y: np.max(np.abs(np.array(y) - y[0]), axis=0), *at_pages
    )
    assert_equal(tape.largest_change, largest_change)


def test_batch_with_different_numbers_of_steps():
    programs = ["", "o.o", "ooo", "j.oooj", ".o..jooo.oo"]
    attempts = [make_attempts(accepted, gaps=True) for accepted in programs]
    stacked = jtu.tree_map(lambda *x: jnp.stack(x), *attempts)
    _, tapes = jax.vmap(lambda x: run(x, True, 1))(stacked)
    # A step may be made from any entry, in an element that makes none.
    for times in (tapes.ends, tapes.starts):
        assert times is not None and np.all(np.isfinite(times))
    for i, accepted in enumerate(programs):
        tape = jtu.tree_map(lambda x: x[i], tapes)
        assert_has(tape, accepted, attempts[i])
        for k in range(int(tape.num_pages)):
            snapshot = jtu.tree_map(lambda x: x[k], tape.snapshots)
            assert_equal((snapshot.y, snapshot.solver_state), solution(3 * k))


def tape_of(num_steps, steps_per_page, num_pages):
    """Its steps end at 1, 2, ..."""
    first = steps_per_page * np.arange(num_pages)[:, None]
    ends = (first + np.arange(steps_per_page + 1)).astype(float)
    size = jnp.array(0.0)
    return Tape(jnp.array(ends), None, None, size, size, jnp.array(num_steps))


@pytest.mark.parametrize("steps_per_page", (1, 2, 15, 16, 17))
def test_parts_have_every_step_once(steps_per_page):
    for num_steps in (0, 1, 2, 3, 14, 15, 16, 17, 31, 32, 33, 34):
        tape = tape_of(num_steps, steps_per_page, -(-34 // steps_per_page))
        for in_parts in (False, True):
            steps = steps_on(tape, in_parts)
            np.testing.assert_array_equal(steps.index, np.arange(num_steps))
            np.testing.assert_array_equal(steps.t1, 1.0 + np.arange(num_steps))


def test_halves_of_a_page():
    """There is a point between two parts if there are two steps."""
    tape = tape_of(18, 16, 2)
    assert tape.parts_per_page == 2
    parts = [tape.part(jnp.array(i)) for i in range(4)]
    assert [int(part.num_steps) for part in parts] == [8, 8, 1, 1]
    assert [int(part.first) for part in parts] == [0, 8, 0, 1]
    assert [int(part.num_before) for part in parts] == [0, 0, 16, 16]
    assert tape_of(18, 15, 2).parts_per_page == 1


def test_plain_loop():
    """It takes what diffrax gives to a loop, and has no derivative to keep things
    for.
    """
    loop = jax.jit(
        lambda y: plain_while_loop(
            lambda y: y < 5, lambda y: y + 1, y, max_steps=3, checkpoints=7
        )
    )
    assert loop(1.0) == 4.0
    assert loop(3.0) == 5.0
