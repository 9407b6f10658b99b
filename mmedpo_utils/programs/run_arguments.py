"""The options that name one run, on several command lines."""

from __future__ import annotations

import argparse


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add profile, variant and seed."""
    parser.add_argument(
        "--profile", required=True, help="a profile's name, or the path of a profile"
    )
    parser.add_argument(
        "--variant", required=True, help="a name under the profile's training.variants"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the LoRA weights and of the order of the pairs"
    )
