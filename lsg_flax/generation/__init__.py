"""Text generation with a cache."""

from lsg_flax.generation.loop import generate as generate
from lsg_flax.generation.sampling import Greedy as Greedy
from lsg_flax.generation.sampling import Picker as Picker
from lsg_flax.generation.sampling import Sample as Sample
from lsg_flax.generation.steps import Decoder as Decoder
from lsg_flax.generation.steps import ModelDecoder as ModelDecoder
