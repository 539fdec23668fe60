"""Whether what was named as the model is a folder at all, said alike by gateways and nodes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_model_folder(folder: Path) -> None:
    """Raises `ConfigError` that says what to name instead."""
    try:
        if folder.is_dir():
            (folder / "config.json").exists()  # what it holds may be out of reach, or not
            return
        is_there = folder.exists()
    except OSError as error:
        told = f"The model folder {folder} cannot be read: {error.strerror}."
        raise ConfigError(told, param="model") from error
    if is_there:
        raise ConfigError(f"{folder} is a file; name the folder that it lies in.", param="model")
    message = f"There is no model folder at {folder}."
    if _HUB_NAME.fullmatch(str(folder)):
        message += (
            " Baton downloads nothing; if that is a name on the Hugging Face Hub, "
            f"`hf download {folder} --local-dir DIR` makes a folder to name."
        )
    raise ConfigError(message, param="model")
