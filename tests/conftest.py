"""Settings for every test; they are made here, before JAX starts."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    _flags = [
        # The workers already fill the cores. A thread pool in each as well makes them
        # wait for one another: the tests' arrays are small.
        "--xla_cpu_multi_thread_eigen=false",
        # Programs run for less time than it takes to compile them.
        "--xla_backend_optimization_level=1",
    ]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])

import jax


# Tests name their dtypes; without this, float64 would silently be float32.
jax.config.update("jax_enable_x64", True)
# An accidental mix of dtypes is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
