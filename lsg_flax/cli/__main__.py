"""`python -m lsg_flax.cli`, the same as `lsg-flax`."""

import sys

from lsg_flax.cli import main

if __name__ == "__main__":
    sys.exit(main())
