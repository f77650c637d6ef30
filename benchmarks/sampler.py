"""A rollout: prompts to responses with their log-probabilities, none of which ends early.

python -m benchmarks.sampler [--json=FILE] [--peer-python=PATH]
"""

import sys

from benchmarks.common import main

if __name__ == "__main__":
    sys.exit(main("sampler", "Tokens per second of a rollout, ours and Tunix'."))
