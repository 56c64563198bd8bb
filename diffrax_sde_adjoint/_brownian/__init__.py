"""Brownian motion: drawn, and drawn again, from one key."""

from .interval import BrownianInterval as BrownianInterval
