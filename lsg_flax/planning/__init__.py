"""The plan of a run on a TPU that is not there."""

from lsg_flax.planning.plan import Attention as Attention
from lsg_flax.planning.plan import Mode as Mode
from lsg_flax.planning.plan import Plan as Plan
from lsg_flax.planning.plan import PlanSettings as PlanSettings
from lsg_flax.planning.plan import Precision as Precision
from lsg_flax.planning.plan import plan as plan
from lsg_flax.planning.search import largest_batch as largest_batch
from lsg_flax.planning.search import nearest_that_fits as nearest_that_fits
