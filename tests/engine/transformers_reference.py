"""Writes tiny seeded checkpoints with `transformers` and the tokens it generates from them.

Run as a script, alone, from another folder: `transformers` probes for a package named `kernels`,
and this repository has one. Usage: `transformers_reference.py OUTPUT_FOLDER [CHECKPOINT...]`.

Output: one folder per family in Hugging Face layout, and `expected.json`:
`{family: [{"prompt": [...], "tokens": [...]}, ...]}`, greedy, in float32. A chat checkpoint given
is a family named as its folder; its tokens may end early, with the end token.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_TOKENS = 24
BLOCK_SIZE = 16
PROMPT_LENGTHS = (
    *(1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 50, 77, 96),
    *(5, 20, 31, 33, 40, 64, 100, 600),
)
_CHATS = (
    (("user", "Hello!"),),
    (("user", "What does os.path.join do?"),),
    (("system", "You answer briefly."), ("user", "Tell me a story about a lighthouse.")),
    (
        ("user", "Who are you?"),
        ("assistant", "I am a small model that serves as an example."),
        (
            "user",
            "What is the difference between a list and a tuple in Python, and when is "
            "one better than the other? Explain it in a few sentences, please.",
        ),
    ),
)
_CUTS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 50, 64)
_VOCAB = 320
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _forget_repository() -> None:
    """Remove every way to import this repository: its folder, and editable installs of it."""
    sys.path[:] = [
        entry for entry in sys.path if entry and Path(entry).resolve() not in _repository_paths()
    ]
    sys.path_hooks[:] = [hook for hook in sys.path_hooks if "__editable__" not in repr(hook)]
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "editable" not in getattr(finder, "__module__", "").lower()
        and "editable" not in getattr(finder, "__name__", "").lower()
    ]
    sys.path_importer_cache.clear()
    if importlib.util.find_spec("kernels") is not None:
        raise RuntimeError("The repository can still be imported.")


def _repository_paths() -> set[Path]:
    return {REPOSITORY, Path(__file__).resolve().parent}


def _models() -> dict[str, Any]:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    return {
        "llama3": LlamaForCausalLM(
            LlamaConfig(**_SIZES, rope_parameters=llama3, tie_word_embeddings=False)
        ),
        "llama_biased_tied": LlamaForCausalLM(
            LlamaConfig(
                **_SIZES | {"num_key_value_heads": 4},
                rope_parameters=linear,
                tie_word_embeddings=True,
                attention_bias=True,
                mlp_bias=True,
            )
        ),
        "mistral": MistralForCausalLM(
            MistralConfig(**_SIZES, sliding_window=20, tie_word_embeddings=False)
        ),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),
        "qwen2_yarn_windows": Qwen2ForCausalLM(
            Qwen2Config(
                **_SIZES,
                rope_parameters=yarn,
                tie_word_embeddings=False,
                use_sliding_window=True,
                sliding_window=24,
                max_window_layers=1,
            )
        ),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)),
        "qwen3_untied": Qwen3ForCausalLM(
            Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=False, attention_bias=True)
        ),
    }


def _randomize(model: Any, seed: int) -> None:
    """Fill what initialisation leaves at 0 or 1, so that a bias or a norm left out is noticed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.2, generator=generator)
        elif name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)


def _prompts(seed: int) -> list[list[int]]:
    """One prompt of each length; from the fourth on every other shares the first 32 tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(2, _VOCAB, (length,), generator=generator).tolist()

    shared = draw(2 * BLOCK_SIZE)
    prompts = []
    for index, length in enumerate(PROMPT_LENGTHS):
        head = shared[:length] if index % 2 else []
        prompts.append(head + draw(length - len(head)))
    return prompts


def _chats(folder: Path) -> list[list[int]]:
    """Chats as a gateway renders them, and the longest one cut off around block boundaries."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = []
    for turns in _CHATS:
        roles = [{"role": role, "content": text} for role, text in turns]
        rendered = tokenizer.apply_chat_template(roles, add_generation_prompt=True, tokenize=False)
        chats.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    longest = max(chats, key=len)
    if len(longest) <= max(_CUTS):
        raise ValueError("No chat is long enough to be cut.")
    return [longest[:length] for length in _CUTS] + chats


def _generate(model: Any, prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    import torch

    cases = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=0,
        )
        cases.append({"prompt": prompt, "tokens": generated[0, len(prompt) :].tolist()})
    return cases


def main(output: Path, checkpoints: list[Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    expected = {}
    for seed, (family, model) in enumerate(_models().items()):
        _randomize(model, seed)
        model.eval()
        model.save_pretrained(output / family, max_shard_size="100KB")
        expected[family] = _generate(model, _prompts(seed))
    for folder in checkpoints:
        checkpoint: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected[folder.name] = _generate(checkpoint.eval(), _chats(folder))
    (output / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    _forget_repository()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
