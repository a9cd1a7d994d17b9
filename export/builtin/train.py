"""Train the built-in model: `python -m edge_llm_export.builtin.train STATE_FOLDER`.

Resumable: an interrupted run continues at the last saved chunk and gives the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .dataset import Batch, chunk, collate, encode
from .generator import samples
from .tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer

CHECKPOINT = Path(__file__).with_name("checkpoint")
DEV_SEED = 9_000_001


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the weights depend on, besides the generator.

    Attributes:
        samples: Samples of a chunk.
        rows: Rows of a batch of average length.
        rates: The learning rate by chunks into the run: corners of a broken line.
        warmup: Steps of linear warm-up.
        stages: The chunks at which the mixture goes on to its next shares.
        choosing: From and to which chunks a step trains on the hardest of `choice` times as many
            samples. Most samples are answered without doubt by then and teach nothing.
        choice: Samples looked at for one trained on.
        weight_decay: On matrices; none on the embedding and on norms.
        seed: Of the initial weights, and of the data.
    """

    samples: int = 4096
    rows: int = 96
    rates: tuple[tuple[int, float], ...] = (
        (0, 4e-3),
        (32, 4e-3),
        (57, 1.9167e-3),
        (84, 8.605e-4),
        (114, 0.0),
        (116, 1.2e-3),
        (130, 0.0),
        (132, 2.5e-3),
        (185, 2.5e-3),
        (235, 0.0),
        (236, 1.2e-3),
        (252, 1.2e-3),
        (275, 0.0),
    )
    warmup: int = 60
    stages: tuple[int, ...] = (57, 114, 130, 235)
    choosing: tuple[tuple[int, int], ...] = ((130, 215), (235, 270))
    choice: int = 4
    weight_decay: float = 0.05
    seed: int = 20_000

    @property
    def chunks(self) -> int:
        """Chunks of samples in all."""
        return self.rates[-1][0]

    def rate(self, at: float, step: int) -> float:
        """The learning rate `at` chunks into the run."""
        for (start, high), (end, low) in itertools.pairwise(self.rates):
            if at < end:
                rate = high + (low - high) * (at - start) / (end - start)
                return rate * min(1.0, (step + 1) / self.warmup)
        return self.rates[-1][1]


RECIPE = Recipe()


def new_model(vocabulary: int, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A Llama of about 3.2 million parameters, random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


class Trainer:
    """The state of a run: weights, optimizer, and the chunk that comes next."""

    def __init__(self, folder: Path, recipe: Recipe, *, compiled: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.recipe = folder, recipe
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        path = folder / "tokenizer.json"
        if not path.exists():
            save_tokenizer(train_tokenizer(), folder)
        self.tokenizer = Tokenizer.from_file(str(path))
        torch.manual_seed(recipe.seed)
        self.model = new_model(self.tokenizer.get_vocab_size(), self.tokenizer).to(self.device)
        # On rows this short the fused kernel's backward pass costs three times the plain one's.
        self.model.set_attn_implementation("eager")
        layers = list(self.model.model.layers.parameters())
        matrices = [p for p in layers if p.dim() == 2]
        rest = [self.model.model.embed_tokens.weight, self.model.model.norm.weight]
        rest += [p for p in layers if p.dim() == 1]
        # Orthogonalized momentum for the matrices: it needs about half of AdamW's samples here.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.next_chunk, self.step, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.surprise = torch.compile(self._surprise, dynamic=True) if compiled else self._surprise
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.next_chunk, self.step = state["next_chunk"], state["step"]
        self.seconds, self.curve = state["seconds"], state["curve"]

    def save(self) -> None:
        """Write the state atomically."""
        path = self.folder / "state.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "next_chunk": self.next_chunk,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def _surprise(
        self, tokens: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Minus the log probability, in nats, of each token to predict: float32 (targets,)."""
        with torch.autocast(self.device, torch.bfloat16):
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[where])
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def _surprises(self, batch: Batch) -> torch.Tensor:
        where = (batch.targets.flatten() != -100).nonzero().flatten()
        targets = batch.targets.flatten()[where].to(self.device)
        surprises: torch.Tensor = self.surprise(
            batch.tokens.to(self.device), where.to(self.device), targets
        )
        return surprises

    def _hardest(self, batch: Batch, shuffled: random.Random) -> Batch:
        """One in `choice` rows: three quarters the least likely answered right, the rest any.

        Source: Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019.
        """
        rows = batch.tokens.shape[0]
        count = max(rows // self.recipe.choice, 2)
        with torch.no_grad():
            surprises = self._surprises(batch)
        row = (batch.targets != -100).nonzero()[:, 0].to(self.device)
        answers = torch.zeros(rows, device=self.device).index_add_(0, row, surprises)
        order = answers.argsort(descending=True).tolist()
        hard = order[: count * 3 // 4]
        chosen = hard + shuffled.sample(order[len(hard) :], count - len(hard))
        width = int((batch.targets[chosen] != -100).any(0).nonzero().max()) + 2
        return Batch(batch.tokens[chosen, :width], batch.targets[chosen, :width])

    def train_chunk(self) -> None:
        """Take the optimizer steps of the next chunk of samples."""
        recipe, began, losses = self.recipe, time.monotonic(), []
        seed = recipe.seed + 1 + self.next_chunk
        stage = sum(self.next_chunk >= start for start in recipe.stages)
        choosing = any(start <= self.next_chunk < end for start, end in recipe.choosing)
        wider = recipe.choice if choosing else 1
        batches = list(
            chunk(
                self.tokenizer,
                seed,
                count=recipe.samples * wider,
                rows=recipe.rows * wider,
                stage=stage,
            )
        )
        shuffled = random.Random(seed)
        for index, drawn in enumerate(batches):
            batch = self._hardest(drawn, shuffled) if choosing else drawn
            rate = recipe.rate(self.next_chunk + index / len(batches), self.step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            losses.append(self._step(batch))
            self.step += 1
        self.next_chunk += 1
        self.seconds += time.monotonic() - began
        tokens = sum(batch.tokens.numel() for batch in batches)
        self.curve.append(
            {
                "chunk": self.next_chunk,
                "step": self.step,
                "rate": rate,
                "loss": round(sum(losses) / len(losses), 5),
                "tokens_per_s": round(tokens / (time.monotonic() - began)),
                "seconds": round(self.seconds),
            }
        )

    def _step(self, batch: Batch) -> float:
        loss = self._surprises(batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def exact(self, count: int = 1024) -> float:
        """Share of a development sample that greedy decoding answers to the letter.

        Greedy decoding gives the right answer exactly where each of its tokens is the likeliest
        after the right ones before it, so one forward pass is enough.
        """
        pairs = [(item.request, item.answer) for item in islice(samples(DEV_SEED), count)]
        rows = sorted(encode(self.tokenizer, pairs), key=lambda row: len(row[0]))
        right = 0
        self.model.eval()
        for start in range(0, count, 128):
            batch = collate(rows[start : start + 128], pad=0)
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
                chosen = self.model(batch.tokens.to(self.device)).logits.argmax(-1).cpu()
            right += int(((chosen == batch.targets) | (batch.targets == -100)).all(-1).sum())
        self.model.train()
        return right / count

    def export(self, folder: Path) -> None:
        """Write the checkpoint: bf16 weights, tokenizer, chat template, loss curve, settings."""
        model = new_model(self.tokenizer.get_vocab_size(), self.tokenizer)
        model.load_state_dict(self.model.state_dict())
        model = model.to(torch.bfloat16)
        model.generation_config = GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
            do_sample=False,
        )
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        lines = [json.dumps(point) for point in self.curve]
        record = f'{{"recipe": {json.dumps(asdict(self.recipe))},\n"curve": [\n'
        record += ",\n".join(lines) + "\n]}\n"
        (folder / "training.json").write_text(record, "utf-8")


def main() -> None:
    """Train to the end of the recipe, then write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="folder for the resumable state")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="where the result goes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--stop-at", type=int, default=RECIPE.chunks, help="chunk to stop at")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = Trainer(options.state, RECIPE, compiled=not options.no_compile)
    while trainer.next_chunk < min(options.stop_at, RECIPE.chunks):
        trainer.train_chunk()
        if trainer.next_chunk % 10 == 0:
            trainer.curve[-1]["dev"] = trainer.exact()
        if trainer.next_chunk % 3 == 0 or trainer.next_chunk == RECIPE.chunks:
            trainer.save()
        print(json.dumps(trainer.curve[-1]), flush=True)
    trainer.save()
    trainer.export(options.checkpoint)


if __name__ == "__main__":
    main()
