"""The separate process in which `plan` compiles: `python -m lsg_flax.planning`."""

import sys

from lsg_flax.planning.plan import main

if __name__ == "__main__":
    sys.exit(main())
