"""`python -m fasttune.verify`."""

import sys

from fasttune.verify.main import main

if __name__ == "__main__":
    sys.exit(main())
