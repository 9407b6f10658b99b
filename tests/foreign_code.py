"""Model folders that bring Python code of their own, which leaves a mark when it is run."""

from __future__ import annotations

import json
from pathlib import Path

CODE = """
from pathlib import Path
Path({mark!r}).mkdir(exist_ok=True)
from transformers import PretrainedConfig
class Foreign(PretrainedConfig):
    model_type = "foreign"
"""
CLASSES = {
    "config.json": {
        "AutoConfig": "foreign.Foreign",
        "AutoModel": "foreign.Foreign",
        "AutoModelForCausalLM": "foreign.Foreign",
    },
    "processor_config.json": {"AutoProcessor": "foreign.Foreign"},
    "tokenizer_config.json": {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]},
}
KEYS = {
    "config.json": {"model_type": "foreign"},
    "processor_config.json": {"processor_class": "Foreign"},
    "tokenizer_config.json": {"tokenizer_class": "Foreign"},
}


def bring_code(folder: Path, file: str, mark: Path) -> Path:
    """Let ``file`` of a model's folder name classes in a module beside it; the folder ``mark`` says
    that it ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | KEYS[file] | {"auto_map": CLASSES[file]}))
    (folder / "foreign.py").write_text(CODE.format(mark=str(mark)))
    return folder
