"""A whole step of GRPO: rollout, the reference's log-probabilities, rewards of texts, update.

python -m benchmarks.rl_step [--json=FILE] [--peer-python=PATH]
"""

import sys

from benchmarks.common import main

if __name__ == "__main__":
    sys.exit(main("rl_step", "Seconds and memory of a whole GRPO step, ours and Tunix'."))
