"""`python -m evaluation.blind --train FILE --test FILE`: the baselines of
`evaluation.audits.blind`.
"""

import signal
import sys

from evaluation.audits.blind import main

if __name__ == "__main__":
    signal.signal(
        signal.SIGPIPE, signal.SIG_DFL
    )  # who reads a pipe may leave early, as `head` does
    sys.exit(main())
