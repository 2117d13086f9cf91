"""The families of checkpoints, one file each. family.py defines what a family is, registry.py lists
them."""

from lsg_flax.models.families.family import Family as Family
from lsg_flax.models.families.family import HeadTable as HeadTable
from lsg_flax.models.families.family import Key as Key
from lsg_flax.models.families.family import Row as Row
from lsg_flax.models.families.family import ToLSG as ToLSG
from lsg_flax.models.families.family import modern_name as modern_name
from lsg_flax.models.families.registry import FAMILIES as FAMILIES
from lsg_flax.models.families.registry import family_of as family_of
from lsg_flax.models.families.registry import model_type_of as model_type_of
from lsg_flax.models.families.registry import read_config as read_config
from lsg_flax.models.families.registry import register as register
