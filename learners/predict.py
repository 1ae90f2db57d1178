"""`python -m learners.predict`: see `learners.run.predict`."""

import sys

from learners.run.predict import main

if __name__ == "__main__":
    sys.exit(main())
