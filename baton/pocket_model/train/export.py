"""Write a checkpoint folder in Hugging Face layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from baton.pocket_model.train.model import PocketModel
from baton.pocket_model.train.tokenizer import BOS_ID, END_ID, PAD_ID, write_tokenizer


def export(model: PocketModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "do_sample": False,
    }
    _write_json(folder / "config.json", model.shape.as_config())
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(tokenizer, folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
