"""`python -m evaluation.blind --train FILE --test FILE`: the baselines of
`evaluation.audits.blind`.
"""

import sys

from evaluation.audits.blind import main

if __name__ == "__main__":
    sys.exit(main())
