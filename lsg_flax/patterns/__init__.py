"""Attention patterns: which keys a query sees, on one device, on a shard, and with a cache."""

from lsg_flax.patterns.cache import Cache as Cache
from lsg_flax.patterns.cache import LayerCache as LayerCache
from lsg_flax.patterns.cache import slots_for as slots_for
from lsg_flax.patterns.config import MAX_GLOBAL_TOKENS as MAX_GLOBAL_TOKENS
from lsg_flax.patterns.config import SPARSITY_TYPES as SPARSITY_TYPES
from lsg_flax.patterns.config import LSGConfig as LSGConfig
from lsg_flax.patterns.config import SparsityType as SparsityType
from lsg_flax.patterns.halo import shard_key as shard_key
from lsg_flax.patterns.operations import attention as attention
from lsg_flax.patterns.operations import extend as extend
from lsg_flax.patterns.operations import prefill as prefill
from lsg_flax.patterns.operations import step as step
from lsg_flax.patterns.pattern import LSG as LSG
from lsg_flax.patterns.pattern import Full as Full
from lsg_flax.patterns.pattern import GlobalTokens as GlobalTokens
from lsg_flax.patterns.pattern import Pattern as Pattern
from lsg_flax.patterns.pattern import Runtime as Runtime
from lsg_flax.patterns.pattern import pattern_of as pattern_of
from lsg_flax.patterns.representatives import DEFAULT_LSH_SEED as DEFAULT_LSH_SEED
from lsg_flax.patterns.representatives import pad_to_blocks as pad_to_blocks
from lsg_flax.patterns.representatives import representatives_of as representatives_of
from lsg_flax.patterns.representatives import right_offset as right_offset
