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


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name one run."""
    parser.add_argument(
        "--profile", required=True, help="a profile's name, or the path of a profile"
    )
    parser.add_argument(
        "--variant", required=True, help="a name under the profile's training.variants"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the LoRA weights and of the order of the pairs"
    )


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
