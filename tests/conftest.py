"""Settings for every test; they are made here, before JAX starts."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already fill the cores. A thread pool in each as well makes them
    # wait for one another: the tests' arrays are small.
    _one_thread = "--xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_one_thread}".strip()

import jax


# Tests name their dtypes; without this, float64 would silently be float32.
jax.config.update("jax_enable_x64", True)
# An accidental mix of dtypes is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
