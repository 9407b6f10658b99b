"""A training over several nodes: its hostfile, and a command for each node.

These commands have run over loopback alone, never over a network.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from ..base.environment import cores_for
from ..base.errors import InputError
from ..base.files import read_text
from ..base.processes import free_port, shorten
from ..launch_command import LAUNCHED, LAUNCHER, process_count, program_arguments
from ..profiles import Profile

HOST_LINE = re.compile(r"([A-Za-z0-9][\w.:-]*)\s+slots=(\d+)")


def node_commands(
    profile: Profile, variant: str, seed: int, run_folder: Path, ssh: bool, dry_run: bool = False
) -> list[list[str]]:
    """What starts the training: one command with ``ssh``, which reaches all nodes, else one a node.

    Without the profile's hostfile one is written into the run folder, unless this is a dry run: in
    it only the number of nodes counts, since each is started by a command of its own. MASTER_ADDR
    and MASTER_PORT say where the first node is found; else it is this machine, and FIRST_NODE in a
    dry run, which may be made anywhere.

    Raises:
        InputError: as `launch_command.process_count`, or MASTER_PORT is no port.
    """
    training = profile.training
    processes = process_count(profile, dry_run)
    each = processes // training.nodes
    hostfile = training.hostfile or run_folder / "hostfile"
    if training.hostfile is None and not dry_run:
        lines = [f"node{number} slots={each}\n" for number in range(training.nodes)]
        hostfile.write_text("".join(lines), encoding="utf-8")
    program = program_arguments(variant, seed, run_folder, processes, cores_for(each))
    hosts = ["--hostfile", shorten(hostfile)]
    port = ["--master_port", _master_port()]
    if ssh:
        return [[*LAUNCHER, *hosts, *port, *LAUNCHED, *program]]
    first = os.environ.get("MASTER_ADDR") or ("FIRST_NODE" if dry_run else socket.gethostname())
    commands = []
    for rank in range(training.nodes):
        node = [*hosts, "--no_ssh", "--node_rank", str(rank), "--master_addr", first, *port]
        commands.append([*LAUNCHER, *node, *LAUNCHED, *program])
    return commands


def _master_port() -> str:
    port = os.environ.get("MASTER_PORT", "").strip()
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(
            "environment variable MASTER_PORT: expected a port from 1 to 65535, found "
            f"{port!r:.40}; correct it, or unset it"
        )
    return port or str(free_port())


def check_hostfile(profile: Profile) -> None:
    """Compare DeepSpeed's list of machines with the profile; the launcher would follow the list,
    whatever it says.

    Raises:
        InputError: the file is not there, a line is none of `NAME slots=NUMBER`, or nodes and slots
            are not the profile's.
    """
    training = profile.training
    path = training.hostfile
    if path is None:
        return
    slots: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines()):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = HOST_LINE.fullmatch(text)  # a name that begins with - would be an option of ssh
        if host is None:
            raise InputError(
                f"{path}: row {number}: expected NAME slots=NUMBER, found {text!r:.60}; correct it"
            )
        slots[host[1]] = int(host[2])
    if len(slots) != training.nodes or sum(slots.values()) != training.processes:
        raise InputError(
            f"{path}: lists {len(slots)} nodes with {sum(slots.values())} slots; expected the "
            f"profile's `training.nodes` ({training.nodes}) and `training.processes` "
            f"({training.processes}): make them the same"
        )
