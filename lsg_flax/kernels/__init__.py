"""Attention of blocks of queries to windows of keys: the contract, and its implementations."""

from lsg_flax.kernels.dropout import drop as drop
from lsg_flax.kernels.spec import Source as Source
from lsg_flax.kernels.spec import Spec as Spec
from lsg_flax.kernels.spec import Window as Window
from lsg_flax.kernels.xla import attend as attend
from lsg_flax.kernels.xla import attend_in_part as attend_in_part
from lsg_flax.kernels.xla import pad as pad
