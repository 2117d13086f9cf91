"""Text generation with a cache."""

from lsg_flax.generation.loop import Sampling as Sampling
from lsg_flax.generation.loop import generate as generate
