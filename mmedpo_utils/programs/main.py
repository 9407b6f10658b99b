"""``mmedpo NAME ...``: every program of the kit by its name."""

from __future__ import annotations

import sys
from importlib import import_module

PROGRAMS = {
    "notebooks": ("run_notebooks", "execute the notebooks in order"),
    "check": ("check", "say whether all that a profile names will load"),
    "plan": ("plan", "what a training would run and what it takes"),
    "launch": ("launch", "train one variant of a profile, or go on with it"),
    "train": ("train", "one training process; launch starts as many as a profile asks for"),
    "pages": ("export_pages", "the notebooks as HTML pages that need no network"),
    "export": ("export", "merge an adapter into a plain Hugging Face folder"),
    "baselines": ("baselines", "build and train the pairs of the paper's baselines"),
    "arena": ("arena", "change one condition, keep the others: when does which part help?"),
    "results": ("reference_results", "recompute the committed reference results"),
    "audit": ("audit", "recompute the audit of the published numbers"),
    "build-medklip": ("build_phantom_medklip", "train the shipped MedKLIP"),
    "build-lvlm": ("build_phantom_lvlm", "train the shipped Med-LVLM"),
}


def usage() -> str:
    """One line a program."""
    lines = ["usage: mmedpo NAME [options]", "", "mmedpo NAME --help shows a program's options."]
    for name, (_, what) in PROGRAMS.items():
        lines.append(f"  {name:<15}{what}")
    return "\n".join(lines)


def main() -> int:
    """Run the program that the first argument names, with the others. Returns its exit status."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in PROGRAMS:
        print(f"mmedpo {name}: there is no such program\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = PROGRAMS[name]
    sys.argv = [f"mmedpo {name}", *rest]
    return import_module(f"{__package__}.{module}").main()


if __name__ == "__main__":
    sys.exit(main())
