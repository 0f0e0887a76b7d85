"""The command line: ``python -m meta_optax`` and ``meta-optax``."""

import sys

from meta_optax.compare._cli import main

if __name__ == "__main__":
    sys.exit(main())
