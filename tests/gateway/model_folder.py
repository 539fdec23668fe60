"""A model folder as gateways read it: a real small tokenizer, a config, a chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CORPUS = [
    "The baton is passed from one runner to the next without a stop.",
    "Hello, how are you today? I am fine, thank you; and you?",
    "Städte und Flüsse, 東京 と 大阪, привет мир, 🙂🙃 naïve café",
    "one two three four five six seven eight nine ten",
] * 4

SPECIAL = ("<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("ordinary added", special=False)])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return backend


def sentencepiece_backend() -> Tokenizer:
    """Like Llama 2's: word-boundary pieces, bytes for what the vocabulary lacks."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    state = json.loads(trained.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def write_model_folder(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, special: Sequence[str] = ()
) -> Path:
    """`special`: tokens beside those that are always there."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = byte_level_backend()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "special": True},
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": backend.get_vocab_size()}))
    return folder
