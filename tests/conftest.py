"""Settings for every test; they are made here, before JAX starts."""

import gc
import importlib.metadata
import os
import pathlib
import sys


if not any(
    "benchmarks" in pathlib.Path(x).parts for x in sys.argv if not x.startswith("-")
):
    # One CPU is several devices. What does not ask for them runs on the first, and a
    # little differently, so there are none in benchmarks.
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    )
if "PYTEST_XDIST_WORKER" in os.environ:
    _flags = [
        # The workers already fill the cores. A thread pool in each as well makes them
        # wait for one another: the tests' arrays are small.
        "--xla_cpu_multi_thread_eigen=false",
        # Programs run for less time than it takes to compile them.
        "--xla_backend_optimization_level=0",
        # XLA need not check its own work.
        "--xla_disable_hlo_passes=hlo-verifier",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # Fused loops are faster to compile in the older way, and programs in one part.
        # XLA ends the process if it does not know a flag; other versions may not.
        _flags.append("--xla_cpu_use_fusion_emitters=false")
        _flags.append("--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])

import jax
import pytest


# Tests name their dtypes; without this, float64 would silently be float32.
jax.config.update("jax_enable_x64", True)
# An accidental mix of dtypes is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish():
    """Tracing makes many objects that live long. Looking at all of them as often as
    Python does by default takes a sixth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Lets go of compiled programs when there are many.

    Each takes some memory maps, of which Linux allows a process 65 530 by default. Then
    XLA ends it with a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 25_000:
        jax.clear_caches()
