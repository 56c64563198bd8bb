"""The table of `docs/many_devices.md` on the cost of adding up gradients, by a model.

    python docs/figures/many_devices.py

It has three numbers: what one device sends to others of its node, and to other nodes,
in bytes a second, and the time that a message takes. Gradients are added up within a
node, then each device adds up its share of them with those of other nodes, and then
they are shared within the node again.
"""

import math


NODE, IN_NODE, BETWEEN_NODES, LATENCY = 8, 450e9, 50e9, 10e-6
PARAMETERS = {
    "SDE-GAN": 3_490,
    "air quality": 26_238,
    "latent SDE of glucose": 28_834,
    "100 million parameters": 100_000_000,
}
DEVICES = (8, 64, 1024)


def seconds(num_bytes: float, devices: int) -> float:
    """Of an all-reduce."""
    total, share = 0.0, num_bytes
    for num, bandwidth in ((NODE, IN_NODE), (devices // NODE, BETWEEN_NODES)):
        total += 2 * (num - 1) / num * share / bandwidth
        total += 2 * math.log2(num) * LATENCY
        share /= num
    return total


def main():
    for name, parameters in PARAMETERS.items():
        num_bytes = 4 * parameters
        times = [f"{1e3 * seconds(num_bytes, n):.2f}" for n in DEVICES]
        print(f"| {name} | {num_bytes / 1e6:.3g} | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
