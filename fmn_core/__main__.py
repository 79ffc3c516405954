"""The command line's door: `python -m fmn_core COMMAND`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
