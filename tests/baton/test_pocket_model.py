"""The bundled checkpoint: complete, small, licensed, and able to answer."""

import json
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer

from baton.pocket_model.train.chat import Message
from baton.pocket_model.train.evaluate import answer
from baton.pocket_model.train.model import PocketModel, Shape
from baton.pocket_model.train.tokenizer import CHAT_TEMPLATE, render

FOLDER = Path(__file__).parents[2] / "baton" / "pocket_model"
MESSAGES = [
    Message("system", "You are a helpful assistant."),
    Message("user", "Hello!"),
    Message("assistant", "Hello! How can I help you?"),
    Message("user", "Thanks"),
]


def read_json(name: str) -> dict[str, object]:
    value = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def chat_prompt(messages: list[dict[str, object]], *, add_generation_prompt: bool) -> str:
    config = read_json("tokenizer_config.json")
    template = ImmutableSandboxedEnvironment().from_string(str(config["chat_template"]))
    return template.render(
        messages=messages,
        bos_token=config["bos_token"],
        add_generation_prompt=add_generation_prompt,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> PocketModel:
    model = PocketModel(Shape())
    weights = load_file(FOLDER / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def test_weights_fit_in_sixteen_mebibytes() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 1024 * 1024


def test_folder_has_all_files_of_the_hugging_face_layout() -> None:
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert expected <= {path.name for path in FOLDER.iterdir()}


def test_config_is_what_the_training_code_describes() -> None:
    assert read_json("config.json") == Shape().as_config()


def test_weights_are_bfloat16_finite_and_named_as_the_architecture_names_them() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert set(weights) == set(PocketModel(Shape()).state_dict())
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_special_tokens_have_the_ids_that_the_configs_name(tokenizer: Tokenizer) -> None:
    for config in (read_json("config.json"), read_json("generation_config.json")):
        for role in ("bos", "eos", "pad"):
            token = read_json("tokenizer_config.json")[f"{role}_token"]
            assert tokenizer.token_to_id(str(token)) == config[f"{role}_token_id"]


def test_vocabulary_is_as_large_as_the_embedding(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]


@pytest.mark.parametrize("text", ["Hello, world!", "x = [1, 22]\n\tπ ≈ 3", "日本語 🙂", " a  b "])
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == read_json("config.json")["bos_token_id"]
    assert tokenizer.decode(encoded.ids) == text


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    messages: list[dict[str, object]] = [
        {"role": message.role, "content": message.content} for message in MESSAGES
    ]
    trained = "".join(render(MESSAGES)[0])
    assert chat_prompt(messages, add_generation_prompt=False) == trained
    assert chat_prompt(messages, add_generation_prompt=True) == (
        trained + "<|im_start|>assistant\n"
    )


def test_chat_template_accepts_text_parts_and_equals_the_training_codes() -> None:
    parts = [{"type": "text", "text": "Hello!"}]
    assert chat_prompt(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    ) == chat_prompt([{"role": "user", "content": "Hello!"}], add_generation_prompt=True)
    assert read_json("tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello!", "How can I help you"),
        ("Who are you?", "pocket model"),
        ("What is 2+2?", "4"),
        ("What does textwrap.dedent do?", "leading whitespace"),
        ("What is the capital of France?", "Paris"),
    ],
)
def test_greedy_answer_is_to_the_point_and_ends(
    model: PocketModel, tokenizer: Tokenizer, question: str, expected: str
) -> None:
    text = answer(model, tokenizer, question, limit=80)
    assert expected in text
    assert not text.endswith("[cut]")


def test_card_states_data_licence_and_limits() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for statement in ("Apache License 2.0", "PSF License Agreement", "## Data", "## Limits"):
        assert statement in card
