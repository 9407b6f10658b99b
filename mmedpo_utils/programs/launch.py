"""Train one variant from a terminal, as the cell of notebook 04 does.

mmedpo launch --profile P --variant V [--seed S]
"""

from __future__ import annotations

import argparse
import signal
import sys

from ..base.errors import InputError
from ..launch import TrainingError, train
from ..profiles import load_profile
from .run_arguments import add_run_arguments


def main() -> int:
    """Parse the command line and train. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train one variant of a profile, or go on with it."
    )
    add_run_arguments(parser)
    options = parser.parse_args()
    # An exit runs the clean-up that leaves no process behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        train(load_profile(options.profile), options.variant, options.seed)
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as error:
        print(f"interrupted. {error}".strip(), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
