"""`python -m evaluation.blind --train FILE --test FILE`: see `evaluation.audits.blind`."""

import sys

from evaluation.audits.blind import main

if __name__ == "__main__":
    sys.exit(main())
