"""What a training would run and what it takes, before it starts.

mmedpo plan --profile P --variant V [--seed S]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from ..base.errors import exit_status
from ..base.processes import printed, shorten
from ..curate import training_rows
from ..launch import check_variant, folder_of
from ..launch_command import launch_command, process_count
from ..preference_rows import row_source
from ..profiles import Profile, load_profile, profile_names
from ..run_folder import manifest_path
from ..scale.estimate import VALIDATION_PAIRS, VALIDATION_SHARE, describe, held_out
from ..scale.nodes import node_commands
from .run_arguments import add_run_arguments


def plan(profile: Profile, variant: str, seed: int = 0) -> str:
    """What `train` would run and what it takes: pairs, memory, steps, commands. It starts and
    writes nothing.

    It needs neither GPU nor weights nor pairs.

    Raises:
        InputError: no such variant, or a manifest that cannot be read.
    """
    check_variant(profile, variant)
    manifest = manifest_path(profile, variant)
    rows = training_rows(profile, variant) if manifest.is_file() else []
    counts = {}
    for source in profile.training.variants[variant].sources:
        made = sum(row_source(row) == source for row in rows)
        counts[source] = made if rows else profile.curation.text_pairs
    total = sum(counts.values())
    pairs = ", ".join(f"{count} {source}" for source, count in counts.items())
    if rows:
        held = int(held_out(rows, seed).sum())
        pairs += f"; {held} of them are held out"
    else:
        held = int(min(VALIDATION_SHARE * total, VALIDATION_PAIRS))
        pairs += "; they are not made yet (notebook 03), estimated with curation.text_pairs"
    processes = process_count(profile, dry_run=True)
    lines = [
        f"Pairs of {shorten(manifest)}: {pairs}",
        describe(profile, variant, rows, total - held, processes),
    ]
    folder = folder_of(profile, variant, seed)
    shipped = profile.name in profile_names() and load_profile(profile.name) == profile
    name = profile.name if shipped else f"{shorten(folder)}/profile.yaml"
    lines.append("The cell, or this command in the repository's folder, writes the run folder")
    lines.append(f"$ mmedpo launch --profile {name} --variant {variant} --seed {seed}")
    lines += _starting_commands(profile, variant, seed, folder)
    return "\n".join(lines)


def _starting_commands(profile: Profile, variant: str, seed: int, folder: Path) -> list[str]:
    """What starts the training processes; with a hostfile in both forms, over ssh and without."""
    if profile.training.nodes == 1:
        here = launch_command(profile, variant, seed, folder, dry_run=True)
        return ["and starts", f"$ {printed(here)}"]
    ways = [("and starts on each node, one command each, without ssh", False)]
    if profile.training.hostfile:
        ways.insert(0, ("and starts over ssh", True))
    lines = []
    for words, ssh in ways:
        lines.append(words)
        for command in node_commands(profile, variant, seed, folder, ssh, dry_run=True):
            lines.append(f"$ {printed(command)}")
    return lines


def dry_run(profile: Profile, variant: str, seed: int = 0) -> None:
    """Print the resolved profile and the `plan` of a variant."""
    print(yaml.safe_dump(profile.as_dict(), sort_keys=False, allow_unicode=True))
    print(plan(profile, variant, seed))


def main() -> int:
    """Print the plan; nothing is started or written. Returns the exit status."""
    parser = argparse.ArgumentParser(description="What a training would run and what it takes.")
    add_run_arguments(parser)
    options = parser.parse_args()
    return exit_status(
        lambda: dry_run(load_profile(options.profile), options.variant, options.seed)
    )


if __name__ == "__main__":
    sys.exit(main())
