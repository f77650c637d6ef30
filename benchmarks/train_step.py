"""One optimiser step on given rows: GRPO's loss with a reference, its gradient, AdamW.

python -m benchmarks.train_step [--json=FILE] [--peer-python=PATH]
"""

import sys

from benchmarks.common import main

if __name__ == "__main__":
    sys.exit(main("train_step", "Seconds and memory of an optimiser step, ours and Tunix'."))
