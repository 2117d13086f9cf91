"""Kernels for attention of blocks of queries to windows of keys: the contract and its
implementations."""

from lsg_flax.kernels.device import device_kind as device_kind
from lsg_flax.kernels.device import rows_to_fill as rows_to_fill
from lsg_flax.kernels.dropout import drop as drop
from lsg_flax.kernels.engine import Implementation as Implementation
from lsg_flax.kernels.engine import accepts as accepts
from lsg_flax.kernels.engine import attend as attend
from lsg_flax.kernels.engine import check_segments as check_segments
from lsg_flax.kernels.engine import is_fused as is_fused
from lsg_flax.kernels.engine import merge_softmax_parts as merge_softmax_parts
from lsg_flax.kernels.reference import attend_reference as attend_reference
from lsg_flax.kernels.reference import masked_softmax as masked_softmax
from lsg_flax.kernels.spec import EVERYTHING as EVERYTHING
from lsg_flax.kernels.spec import NEGATIVE as NEGATIVE
from lsg_flax.kernels.spec import NOT_SELF as NOT_SELF
from lsg_flax.kernels.spec import PAST as PAST
from lsg_flax.kernels.spec import Biases as Biases
from lsg_flax.kernels.spec import Queries as Queries
from lsg_flax.kernels.spec import Rule as Rule
from lsg_flax.kernels.spec import Source as Source
from lsg_flax.kernels.spec import Spec as Spec
from lsg_flax.kernels.spec import Window as Window
from lsg_flax.kernels.tpu import attend_fused as attend_fused
from lsg_flax.kernels.tpu import plan_fused as plan_fused
from lsg_flax.kernels.tpu_full import attend_full as attend_full
from lsg_flax.kernels.tpu_full import plan_full as plan_full
from lsg_flax.kernels.tpu_plan import BLOCKS as BLOCKS
from lsg_flax.kernels.tpu_plan import FusedPlan as FusedPlan
from lsg_flax.kernels.tpu_plan import FusedSpec as FusedSpec
from lsg_flax.kernels.tpu_plan import Near as Near
from lsg_flax.kernels.tpu_plan import Selecting as Selecting
from lsg_flax.kernels.tpu_plan import Turn as Turn
from lsg_flax.kernels.windows import pad as pad
from lsg_flax.kernels.xla import ATTENDED as ATTENDED
