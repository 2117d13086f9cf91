"""Text generation: greedy decoding, sampling and beam search, with a cache."""

from lsg_flax.generation.beam import Beams as Beams
from lsg_flax.generation.generate import Ready as Ready
from lsg_flax.generation.generate import check_options as check_options
from lsg_flax.generation.generate import generate as generate
from lsg_flax.generation.generate import prepare as prepare
from lsg_flax.generation.loop import begin as begin
from lsg_flax.generation.loop import decode as decode
from lsg_flax.generation.options import OPTION_NAMES as OPTION_NAMES
from lsg_flax.generation.options import GenerateCall as GenerateCall
from lsg_flax.generation.options import GenerateOptions as GenerateOptions
from lsg_flax.generation.options import choose_options as choose_options
from lsg_flax.generation.rules import Rules as Rules
from lsg_flax.generation.rules import Text as Text
from lsg_flax.generation.sampling import Greedy as Greedy
from lsg_flax.generation.sampling import Sample as Sample
from lsg_flax.generation.steps import Decoder as Decoder
from lsg_flax.generation.steps import ModelDecoder as ModelDecoder
from lsg_flax.generation.steps import Prompt as Prompt
