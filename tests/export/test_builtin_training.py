"""The tokenizer, the batches, and a run that is interrupted and resumed."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edge_llm_export.builtin.dataset import chunk, encode  # noqa: E402
from edge_llm_export.builtin.decode import answers  # noqa: E402
from edge_llm_export.builtin.generator import samples  # noqa: E402
from edge_llm_export.builtin.tokenizer import ANSWER, rendered  # noqa: E402
from edge_llm_export.builtin.train import CHECKPOINT, RECIPE, Trainer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_tokenizer_is_lossless_and_short(tokenizer: Tokenizer) -> None:
    pairs = list(islice(samples(21), 1_000))
    for sample in pairs:
        for text in (rendered(sample.request), sample.answer):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text
    row = tokenizer.encode('{"action":"on","device":"light"}', add_special_tokens=False)
    assert row.tokens == ['{"action":"', "on", '","device":"', "light", '"}']
    assert tokenizer.encode("1234", add_special_tokens=False).tokens == list("1234")
    assert tokenizer.get_vocab_size() <= 2048


def test_words_are_the_same_tokens_wherever_they_stand(tokenizer: Tokenizer) -> None:
    asked = tokenizer.encode("remind me to flabbergast zorbels", add_special_tokens=False).tokens
    label = tokenizer.encode(',"label":"flabbergast zorbels"}', add_special_tokens=False).tokens
    copied = label[1:-1]
    assert asked[-len(copied) :] == copied


def test_chat_template_renders_the_last_user_message_only(tokenizer: Tokenizer) -> None:
    fast = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    messages = [
        {"role": "system", "content": "You are a pirate"},
        {"role": "user", "content": "open the blinds"},
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": "  Turn ON\n the  LIGHT "},
    ]
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{rendered('  Turn ON the  LIGHT ')}{ANSWER}"
    ids = fast.apply_chat_template(messages, add_generation_prompt=True)
    row, start = encode(tokenizer, [(messages[-1]["content"], "x")])[0]
    assert ids == row[:start]


def test_targets_are_the_answer_and_the_end(tokenizer: Tokenizer) -> None:
    batches = list(chunk(tokenizer, 5, count=200, rows=16))
    again = list(chunk(tokenizer, 5, count=200, rows=16))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))
    asked = {rendered(s.request): s.answer for s in islice(samples(5), 200)}
    for batch in batches:
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            said = targets[targets != -100].tolist()
            assert said[-1] == tokenizer.token_to_id("</s>")
            mark = tokens.tolist().index(tokenizer.token_to_id(ANSWER))
            request = tokenizer.decode(tokens[1:mark].tolist(), skip_special_tokens=False)
            assert asked[request] == tokenizer.decode(said)
            assert tokens[mark + 1 : mark + 1 + len(said)].tolist() == said


def test_an_interrupted_run_gives_the_same_weights(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Steps this small only wait for one another on several threads, most of all on a busy machine.
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    recipe = replace(
        RECIPE,
        samples=48,
        rows=16,
        rates=((0, 1e-3), (1, 1e-3), (3, 0.0)),
        warmup=2,
        stages=(2,),
        choosing=((1, 3),),
        choice=2,
    )
    weights = []
    for name, stops in (("through", (3,)), ("resumed", (1, 2, 3))):
        (tmp_path / name).mkdir()
        shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path / name)  # training one takes a while
        for stop in stops:
            trainer = Trainer(tmp_path / name, recipe, compiled=False)
            while trainer.next_chunk < stop:
                trainer.train_chunk()
            trainer.save()
        weights.append(trainer.model.state_dict())
        assert [point["chunk"] for point in trainer.curve] == [1, 2, 3]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_hardest_rows_are_chosen(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path)
    trainer = Trainer(tmp_path, replace(RECIPE, choice=4), compiled=False)
    batch = max(chunk(trainer.tokenizer, 3, count=64, rows=32), key=lambda one: len(one.tokens))
    model = trainer.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.tokens).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.targets, reduction="none"
    ).sum(-1)
    chosen = trainer._hardest(batch, random.Random(0))
    count = len(batch.tokens) // 4
    width = chosen.tokens.shape[1]
    whole = [tuple(row.tolist()) for row in batch.tokens[:, :width]]
    picked = [whole.index(tuple(row.tolist())) for row in chosen.tokens]
    assert len(set(picked)) == count
    hardest = losses.argsort(descending=True).tolist()
    assert set(hardest[: count // 2]) <= set(picked)
    # Nothing that is to be predicted was cut off.
    assert int((chosen.targets != -100).sum()) == int((batch.targets[picked] != -100).sum())


def test_rates_rise_stay_and_fall() -> None:
    recipe = replace(RECIPE, rates=((0, 1.0), (5, 1.0), (10, 0.0)), warmup=100)
    assert recipe.chunks == 10
    assert recipe.rate(0, 49) == 0.5
    assert recipe.rate(4.9, 5000) == 1.0
    assert recipe.rate(7.5, 5000) == 0.5
    assert recipe.rate(10, 5000) == 0.0


def test_checkpoint_is_small_and_of_the_right_shape() -> None:
    config = transformers.AutoConfig.from_pretrained(CHECKPOINT)
    assert config.model_type == "llama"
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
    assert config.head_dim % 16 == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 8_000_000


def test_checkpoint_answers_most_of_a_held_out_sample(tokenizer: Tokenizer) -> None:
    from edge_llm_export.builtin.evaluation import exact_match, held_out_split

    split = held_out_split(200)
    model = transformers.LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    given = answers(model.eval(), tokenizer, [sample.request for sample in split])
    right, total = exact_match(split, given)["all"]
    assert right / total >= 0.97
