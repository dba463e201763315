"""``python -m chts_train``: the command line, as ``torchrun -m chts_train`` starts it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
