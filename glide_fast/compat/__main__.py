"""``python -m glide_fast.compat SCRIPT [ARGS...]``: see :mod:`glide_fast.compat.run`."""

import sys

from glide_fast.compat.run import main

if __name__ == "__main__":
    main(sys.argv[1:], "python -m glide_fast.compat")
