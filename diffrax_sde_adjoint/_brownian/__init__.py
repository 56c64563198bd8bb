"""Brownian motion, drawn and drawn again from one key: cut into cells, which are halved
down to leaves, inside of which there is a bridge (the law of `W`, `H` and `K` at a
point, given the whole).
"""

from .interval import BrownianInterval as BrownianInterval
