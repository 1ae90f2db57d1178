"""`python -m utils.compare`: see `utils.results.compare`."""

import sys

from utils.results.compare import main

if __name__ == "__main__":
    sys.exit(main())
