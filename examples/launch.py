"""Runs an example as one of several processes, of which each has devices of its own.

    python examples/launch.py --coordinator localhost:1234 --processes 2 --process 0 \\
        examples/latent_sde.py --devices 4

and the same with `--process 1`, make one training on four devices, two of each process.
Where JAX finds out by itself which processes there are, as under Slurm, on Cloud TPU,
or in a Kubernetes job,

    srun python examples/launch.py examples/latent_sde.py --devices 16

is all. See `docs/many_devices.md`.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path


# An error in one process would leave the others waiting. Instead, a solve that fails is
# not a number, and the training stops in all of them. It is read at import.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import jax


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--coordinator", help="the address and port of the first process"
    )
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="the number of this one, from 0 on")
    parser.add_argument("script", type=Path, help="that each process runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
    sys.argv = [str(args.script), *args.arguments]
    sys.path.insert(0, str(args.script.parent))
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    main()
