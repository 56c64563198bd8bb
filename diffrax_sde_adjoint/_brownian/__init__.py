from .interval import BrownianInterval as BrownianInterval
