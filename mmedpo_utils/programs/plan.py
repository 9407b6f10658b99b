"""What a training would run and what it takes, before it starts.

mmedpo plan --profile P --variant V [--seed S]
"""

from __future__ import annotations

import argparse
import sys

import yaml

from ..base.environment import check_device, cores_for
from ..base.errors import exit_status
from ..base.processes import printed, shorten
from ..curate import manifest_path, training_rows
from ..launch import check_variant, folder_of
from ..launch_command import launch_command, process_count
from ..preference_rows import row_source
from ..profiles import Profile, load_profile, profile_names
from ..scale.estimate import describe
from ..scale.nodes import node_commands
from .launch import add_run_arguments


def plan(profile: Profile, variant: str, seed: int = 0) -> str:
    """What `train` would run and what it takes: pairs, memory, hours, commands. It starts and
    writes nothing.

    It needs neither GPU nor weights nor pairs.

    Raises:
        InputError: no such variant, or a manifest that cannot be read.
    """
    check_variant(profile, variant)
    manifest = manifest_path(profile, variant)
    sources = profile.training.variants[variant].sources
    rows = training_rows(profile, variant) if manifest.is_file() else []
    counts = {source: sum(row_source(row) == source for row in rows) for source in sources}
    if not rows:
        counts = dict.fromkeys(sources, profile.curation.text_pairs)
    processes = process_count(profile, dry_run=True)
    on_cpu = profile.lvlm.device != "cuda" and check_device(profile.lvlm.device) == "cpu"
    lines = [
        f"Pairs of {shorten(manifest)}: "
        + ", ".join(f"{count} {source}" for source, count in counts.items())
        + (
            ""
            if rows
            else "; they are not made yet (notebook 03), reckoned with curation.text_pairs"
        ),
        describe(
            profile, variant, rows, counts, processes, cores_for(processes) if on_cpu else None
        ),
    ]
    folder = folder_of(profile, variant, seed)
    several = profile.training.nodes > 1
    shipped = profile.name in profile_names() and load_profile(profile.name) == profile
    name = profile.name if shipped else f"{shorten(folder)}/profile.yaml"
    lines += [
        "The cell, or this command in the repository's folder, writes the run folder",
        f"$ python -m mmedpo_utils.launch --profile {name} --variant {variant} --seed {seed}",
    ]
    if not several:
        starts = [("and starts", [launch_command(profile, variant, seed, folder, dry_run=True)])]
    else:
        by_hand = node_commands(profile, variant, seed, folder, ssh=False, dry_run=True)
        starts = [("and starts on each node, one command each, without ssh", by_hand)]
        if profile.training.hostfile:
            over_ssh = node_commands(profile, variant, seed, folder, ssh=True, dry_run=True)
            starts.insert(0, ("and starts over ssh", over_ssh))
    for where, commands in starts:
        lines.append(where)
        lines += ["$ " + printed(command) for command in commands]
    return "\n".join(lines)


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
