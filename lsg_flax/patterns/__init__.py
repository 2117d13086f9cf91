"""Attention patterns: which keys a query sees, on one device, on a shard, and with a cache."""

from lsg_flax.patterns.cache import Cache as Cache
from lsg_flax.patterns.cache import LayerCache as LayerCache
from lsg_flax.patterns.cache import attend_step as attend_step
from lsg_flax.patterns.cache import extend as extend
from lsg_flax.patterns.cache import first_layer_cache as first_layer_cache
from lsg_flax.patterns.cache import prompt_length as prompt_length
from lsg_flax.patterns.cache import slots_for as slots_for
from lsg_flax.patterns.config import MAX_GLOBAL_TOKENS as MAX_GLOBAL_TOKENS
from lsg_flax.patterns.config import SPARSITY_TYPES as SPARSITY_TYPES
from lsg_flax.patterns.config import LSGConfig as LSGConfig
from lsg_flax.patterns.config import SparsityType as SparsityType
from lsg_flax.patterns.config import require as require
from lsg_flax.patterns.lsg import DEFAULT_LSH_SEED as DEFAULT_LSH_SEED
from lsg_flax.patterns.lsg import Dropout as Dropout
from lsg_flax.patterns.lsg import GlobalTokens as GlobalTokens
from lsg_flax.patterns.lsg import Tokens as Tokens
from lsg_flax.patterns.lsg import attend_features_first as attend_features_first
from lsg_flax.patterns.lsg import attend_to_all as attend_to_all
from lsg_flax.patterns.lsg import full_rows as full_rows
from lsg_flax.patterns.lsg import pad_to_blocks as pad_to_blocks
from lsg_flax.patterns.lsg import representatives_of as representatives_of
from lsg_flax.patterns.lsg import right_offset as right_offset
from lsg_flax.patterns.lsg import rotations_of as rotations_of
