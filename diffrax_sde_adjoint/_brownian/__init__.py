"""Brownian motion, drawn and drawn again from one key: cut into cells, which are halved
down to leaves, with a bridge inside of each (its law, given the whole leaf).
"""

from .interval import BrownianInterval as BrownianInterval
