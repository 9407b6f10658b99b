"""Recompute the audit of the published numbers beside them: ``mmedpo audit``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from ..base.errors import exit_status
from ..base.files import write_json
from ..base.settings import repository_root
from ..released import published_audit


def main() -> int:
    """Write data_manifests/published_audit.json. Returns the exit status."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = repository_root() / "data_manifests" / "published_audit.json"

    def action() -> None:
        lines = published_audit.audit(published_audit.read_tables())
        about = " ".join(published_audit.__doc__.partition("\n\n")[0].split())
        write_json(path, {"about": about, "lines": [asdict(line) for line in lines]})
        broken = sum(not line.holds for line in lines)
        print(f"written: {path.name}, {len(lines)} lines, {broken} do not hold")

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
