"""LSG attention, and the long-document models built on it, in JAX/Flax.

Importing the package does not import torch.
"""

import importlib
from types import ModuleType

from lsg_flax.attention import full_attention as full_attention
from lsg_flax.attention import local_attention as local_attention
from lsg_flax.attention import lsg_attention as lsg_attention
from lsg_flax.generation import generate as generate
from lsg_flax.hub import convert_checkpoint as convert_checkpoint
from lsg_flax.hub import from_pretrained as from_pretrained
from lsg_flax.hub import save_pretrained as save_pretrained
from lsg_flax.models import EncoderConfig as EncoderConfig
from lsg_flax.models import EncoderDecoderConfig as EncoderDecoderConfig
from lsg_flax.models import Model as Model
from lsg_flax.models import ModelOutput as ModelOutput
from lsg_flax.open_qa import OpenQA as OpenQA
from lsg_flax.patterns import LSGConfig as LSGConfig
from lsg_flax.pipelines import pipeline as pipeline

__version__ = "0.2.0"

# Imported on first use: these folders are slow to import, or are not needed for inference.
_LAZY = ("adapters", "data", "planning", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"lsg_flax.{name}")
    raise AttributeError(f"module 'lsg_flax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
