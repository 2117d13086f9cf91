"""Attention patterns: which keys a query sees, on one device, on a shard, and with a cache."""

from lsg_flax.patterns.arguments import Arrays as Arrays
from lsg_flax.patterns.arguments import check_shards as check_shards
from lsg_flax.patterns.arguments import checked_arrays as checked_arrays
from lsg_flax.patterns.arguments import checked_for as checked_for
from lsg_flax.patterns.arguments import checked_tokens as checked_tokens
from lsg_flax.patterns.arguments import features_first as features_first
from lsg_flax.patterns.arguments import tokens_first as tokens_first
from lsg_flax.patterns.cache import Cache as Cache
from lsg_flax.patterns.cache import LayerCache as LayerCache
from lsg_flax.patterns.cache import slots_for as slots_for
from lsg_flax.patterns.cache_rows import keep_rows as keep_rows
from lsg_flax.patterns.cache_rows import step_by_buckets as step_by_buckets
from lsg_flax.patterns.cache_rows import step_in_ring as step_in_ring
from lsg_flax.patterns.cache_rows import windows_from as windows_from
from lsg_flax.patterns.cache_rows import write_rows as write_rows
from lsg_flax.patterns.config import MAX_GLOBAL_TOKENS as MAX_GLOBAL_TOKENS
from lsg_flax.patterns.config import SPARSITY_TYPES as SPARSITY_TYPES
from lsg_flax.patterns.config import LSGConfig as LSGConfig
from lsg_flax.patterns.config import SparsityType as SparsityType
from lsg_flax.patterns.dense import seen_by as seen_by
from lsg_flax.patterns.halo import shard_key as shard_key
from lsg_flax.patterns.local import attend_locally as attend_locally
from lsg_flax.patterns.local import unit as unit
from lsg_flax.patterns.lsh import bucket_of as bucket_of
from lsg_flax.patterns.lsh import sort_by_bucket as sort_by_bucket
from lsg_flax.patterns.lsh_reference import (
    attend_by_buckets_reference as attend_by_buckets_reference,
)
from lsg_flax.patterns.operations import attention as attention
from lsg_flax.patterns.operations import extend as extend
from lsg_flax.patterns.operations import prefill as prefill
from lsg_flax.patterns.operations import step as step
from lsg_flax.patterns.pattern import LSG as LSG
from lsg_flax.patterns.pattern import LSH as LSH
from lsg_flax.patterns.pattern import Full as Full
from lsg_flax.patterns.pattern import GlobalTokens as GlobalTokens
from lsg_flax.patterns.pattern import Local as Local
from lsg_flax.patterns.pattern import Pattern as Pattern
from lsg_flax.patterns.pattern import Runtime as Runtime
from lsg_flax.patterns.pattern import pattern_of as pattern_of
from lsg_flax.patterns.pattern import with_globals_behind as with_globals_behind
from lsg_flax.patterns.representatives import DEFAULT_LSH_SEED as DEFAULT_LSH_SEED
from lsg_flax.patterns.representatives import pad_to_blocks as pad_to_blocks
from lsg_flax.patterns.representatives import representatives_of as representatives_of
from lsg_flax.patterns.representatives import right_offset as right_offset
from lsg_flax.patterns.rotary import Rotary as Rotary
from lsg_flax.patterns.rotary import frequencies as frequencies
from lsg_flax.patterns.rotary import rotary_of as rotary_of
from lsg_flax.patterns.segments import are_texts as are_texts
from lsg_flax.patterns.segments import check_packing as check_packing
from lsg_flax.patterns.segments import only_of_texts as only_of_texts
from lsg_flax.patterns.segments import with_globals as with_globals
