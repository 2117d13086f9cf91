"""LSG attention and long-document BERT-like encoders in JAX/Flax. Importing it does not import
torch."""

from lsg_flax.attention import full_attention as full_attention
from lsg_flax.attention import lsg_attention as lsg_attention
from lsg_flax.config import EncoderConfig as EncoderConfig
from lsg_flax.config import LSGConfig as LSGConfig
from lsg_flax.hub import convert_checkpoint as convert_checkpoint
from lsg_flax.hub import from_pretrained as from_pretrained
from lsg_flax.hub import save_pretrained as save_pretrained
from lsg_flax.models.heads import ModelOutput as ModelOutput
from lsg_flax.models.model import Model as Model
from lsg_flax.pipelines import pipeline as pipeline

__version__ = "0.1.0"
