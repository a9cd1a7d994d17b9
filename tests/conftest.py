"""What several tests share: real checkpoints where there are any, and tiny seeded ones."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edge_llm import LLM

SHARED = Path(__file__).parents[1].parent / "shared"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity. "
    "Größe, naïveté, 東京, 🙂 and 1,024 other things."
)

settings.register_profile("edge_llm", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("edge_llm")

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start to interrupt it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder of real checkpoints beside the checkout: {SHARED.name}/")
    return SHARED


MakeCheckpoint = Callable[..., "PreTrainedModel"]

# Sizes of tiny checkpoints, where a family has the key.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """A function that writes a tiny seeded checkpoint, tokenizer and chat template included.

    ``make_checkpoint(folder, model_type, **config)`` gives the transformers model, float32, with
    its plainest attention and in evaluation mode.
    """
    return write_checkpoint


def write_checkpoint(
    folder: Path, model_type: str, *, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """See ``make_checkpoint``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
    from transformers.models.stablelm.modeling_stablelm import StableLmPreTrainedModel

    torch.manual_seed(seed)
    default = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in TINY.items() if hasattr(default, name)}
    settings = AutoConfig.for_model(model_type, **(sizes | config))
    # StableLM's own (transformers 4.57) fails at norms without a bias.
    initialize = patch.object(
        StableLmPreTrainedModel, "_init_weights", PreTrainedModel._init_weights
    )
    with initialize:
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter += torch.randn_like(parameter) * 0.3
            else:
                parameter *= 4  # logits far enough apart for greedy decoding to be stable
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def make_llama(make_checkpoint: MakeCheckpoint) -> MakeCheckpoint:
    """``make_checkpoint`` of a Llama."""
    return partial(make_checkpoint, model_type="llama")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of about 350 tokens with ChatML's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_checkpoint(make_llama: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_llama(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its float32 bundle."""
    from edge_llm_export import export_model

    folder = tmp_path_factory.mktemp("bundles") / "tiny-fp32"
    export_model(tiny_checkpoint, folder, quantize="fp32")
    return folder


@pytest.fixture
def tiny_llm(tiny_bundle: Path) -> Iterator[LLM]:
    """The float32 bundle, loaded."""
    from edge_llm import LLM

    with LLM(tiny_bundle) as llm:
        yield llm
