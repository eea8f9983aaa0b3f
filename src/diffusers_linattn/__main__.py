"""`python -m diffusers_linattn`."""

import sys

from diffusers_linattn.cli import main


if __name__ == "__main__":
    sys.exit(main())
