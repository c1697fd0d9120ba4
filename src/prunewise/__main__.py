"""`python -m prunewise` is the command `prunewise`."""

from __future__ import annotations

import sys

from prunewise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
