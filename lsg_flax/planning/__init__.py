"""Plans of runs on TPUs or GPUs, made without these devices."""

from lsg_flax.planning.plan import plan as plan
from lsg_flax.planning.roofline import check_roofline as check_roofline
from lsg_flax.planning.roofline import draw_roofline as draw_roofline
from lsg_flax.planning.search import largest_batch as largest_batch
from lsg_flax.planning.search import nearest_that_fits as nearest_that_fits
from lsg_flax.planning.settings import TARGET_LENGTH as TARGET_LENGTH
from lsg_flax.planning.settings import AttentionKind as AttentionKind
from lsg_flax.planning.settings import GenerationPlan as GenerationPlan
from lsg_flax.planning.settings import Plan as Plan
from lsg_flax.planning.settings import PlanSettings as PlanSettings
from lsg_flax.planning.settings import RunKind as RunKind
from lsg_flax.planning.settings import StepReads as StepReads
from lsg_flax.planning.settings import least_time as least_time
