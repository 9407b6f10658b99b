"""Run the notebooks in order: ``mmedpo notebooks --profile phantom``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil

from ..base.cards import load_card
from ..base.errors import InputError, cannot_write
from ..base.files import atomic_write
from ..base.privacy import check_outputs
from ..base.settings import is_path
from ..profiles import Profile, load_profile

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


class PeakMemory(threading.Thread):
    """Watch this process and its children; keep the largest resident size of any single one, in
    GiB.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gib = 0.0
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Sample four times a second until ``stop``."""
        me = psutil.Process()
        while not self._stop_event.wait(0.25):
            for process in [me, *me.children(recursive=True)]:
                try:
                    self.gib = max(self.gib, process.memory_info().rss / 2**30)
                except psutil.NoSuchProcess:
                    continue

    def stop(self) -> float:
        """End the watch and return the peak in GiB."""
        self._stop_event.set()
        self.join()
        return self.gib


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what only the executor needs: its timings and the cell with the injected parameters."""
    notebook.metadata.pop("papermill", None)
    kept = []
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            continue
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        kept.append(cell)
    notebook.cells = kept
    return notebook


def run_notebook(path: Path, target: Path, profile_name: str) -> None:
    """Execute one notebook and write the executed copy.

    Raises:
        papermill.PapermillExecutionError: a cell failed; the message holds the cell and its error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # The notebooks name phantom themselves: without a parameter no cell is injected.
    parameters = {} if profile_name == "phantom" else {"profile_name": profile_name}
    papermill.execute_notebook(
        str(path),
        str(target),
        parameters=parameters,
        cwd=str(path.parent),
        kernel_name="python3",
        progress_bar=False,
        extra_arguments=["--log-level=ERROR"],
    )
    notebook = clean(nbformat.read(target, as_version=4))
    with atomic_write(target) as temporary:
        nbformat.write(notebook, temporary)


def run(profile: Profile, profile_name: str, in_place: bool = False) -> dict[str, float]:
    """Execute every notebook in order with a progress line each.

    Args:
        profile_name: a profile's name or the path of its file; it becomes the notebooks' parameter.
        in_place: write the executed notebooks over the ones in ``notebooks``, and their figures
            over those in ``figures``, as they are committed.

    Returns:
        seconds per notebook, "total" seconds, and "peak_gib", the largest process.

    Raises:
        InputError: texts or images of credentialed data would be written outside the run folder.
        papermill.PapermillExecutionError: a cell failed.
    """
    check_outputs(load_card(profile.data.card), profile.output, profile.figures, in_place)
    notebooks = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not notebooks:
        raise InputError(
            f"{NOTEBOOKS}: holds no notebook; an installed package comes without them: clone the "
            "repository, and run this program in it"
        )
    seconds: dict[str, float] = {}
    memory = PeakMemory()
    memory.start()
    for number, path in enumerate(notebooks, 1):
        print(f"[{number}/{len(notebooks)}] {path.stem} ...", end=" ", flush=True)
        started = time.perf_counter()
        executed = profile.output / "notebooks" / path.name
        run_notebook(path, executed, profile_name)
        if in_place:
            shutil.copyfile(executed, path)
        seconds[path.stem] = round(time.perf_counter() - started, 1)
        print(f"{seconds[path.stem]:.0f} s", flush=True)
    if in_place:
        for figure in (*profile.figures.glob("*.png"), *profile.figures.glob("*.svg")):
            shutil.copyfile(figure, ROOT / "figures" / figure.name)
    seconds["total"] = round(sum(seconds.values()), 1)
    seconds["peak_gib"] = round(memory.stop(), 2)
    return seconds


SHOWN = ("closed_accuracy", "open_recall", "bleu", "rouge_l", "attention_in_lesion")


def scores_as_text(scores: dict[str, dict]) -> str:
    """The scores of each model as a plain text table, in percent."""
    width = max(18, *(len(model) + 1 for model in scores))
    head = [metric.replace("_", " ") for metric in SHOWN]
    lines = [f"{'model':{width}}" + "".join(f"{title:>22}" for title in head)]
    for model, row in scores.items():
        cells = [_interval(row.get(metric)) for metric in SHOWN]
        lines.append(f"{model:{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _interval(score: dict[str, float] | None) -> str:
    """A score with its interval; a dash where there is none."""
    if not score:
        return "-"
    return f"{score['mean']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def main() -> int:
    """Command line: run, then print the results and where to look next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--profile", default="phantom", help="a profile's name, or the path of a YAML file"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="write the executed notebooks over notebooks/"
    )
    options = parser.parse_args()
    try:
        profile = load_profile(options.profile)
        # The notebooks run in a folder of their own, where a relative path would mean another file.
        name = str(Path(options.profile).resolve()) if is_path(options.profile) else options.profile
        seconds = run(profile, name, options.in_place)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(cannot_write(profile.output, error), file=sys.stderr)
        return 2
    except papermill.PapermillExecutionError as error:
        print(
            f"\n{error}\nThe notebook stopped here. Its copy with the outputs so far lies under "
            f"{profile.output}.",
            file=sys.stderr,
        )
        return 1
    scores = profile.output / "evaluation" / "scores.json"
    executed = NOTEBOOKS if options.in_place else profile.output / "notebooks"
    print(f"\n{seconds['total']:.0f} s, largest process {seconds['peak_gib']:.1f} GiB\n")
    print(scores_as_text(json.loads(scores.read_text())["models"]))
    print(
        f"\nIn percent, with 95% intervals. Figures: {profile.figures}. Executed notebooks: "
        f"{executed}. Next: make lab, and open 01_medklip_attention."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
