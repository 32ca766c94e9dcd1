"""Trains the embedded model: `python -m models.embedded.train`.

The text comes from `models.embedded.corpus`, the tokenizer is learned from it, and every token is
seen once. A checkpoint in `build/embedded/` lets a killed run go on where it was; the finished
files are written beside this module.
"""

import os

# A thread that waits must sleep, not spin: on a busy machine spinning costs a factor of five. Both
# settings are read when the libraries are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from models import embedded
from models.embedded import tokenizer as chat_tokenizer
from models.embedded.corpus import MIX, PRACTICE, conversations
from models.embedded.network import Llama, Shape

SEED = 2
STEPS = 1600
PRACTICE_FROM = 500  # the step from which the text is mostly about computing and copying
TOKENS_PER_STEP = 4096
WARMUP, DECAY = 40, 0.6  # steps; the last share of the steps, over which the rate falls to zero
MUON_RATE, ADAM_RATE = 6e-3, 3e-3
QUESTION_WEIGHT = 0.1  # of the loss on a token that is not part of an answer
# Length of the rows, and up to how many exchanges a conversation has in them. Short rows are cheap
# and hold most of the text; the long ones teach what a long chat looks like.
ROWS = [(256, 4)] * 12 + [(512, 8)] * 5 + [(1024, 24)] * 2 + [(2048, 60)]
BUILD = Path("build/embedded")


def batches(tokenizer: Tokenizer, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tokens and loss weights, both [rows, length + 1].

    Each row starts with a conversation and is filled with more of them; the last one is cut.
    """
    order = torch.Generator().manual_seed(SEED)
    sources = [
        {rows: conversations(SEED + rows[0] + i, rows[1], mix) for rows in sorted(set(ROWS))}
        for i, mix in enumerate((MIX, PRACTICE))
    ]
    for step in range(steps):
        if step % len(ROWS) == 0:
            cycle = torch.randperm(len(ROWS), generator=order).tolist()
        length, _ = rows_now = ROWS[cycle[step % len(ROWS)]]
        source = sources[step >= PRACTICE_FROM][rows_now]
        rows = [fill(source, tokenizer, length + 1) for _ in range(TOKENS_PER_STEP // length)]
        tokens, weights = zip(*rows, strict=True)
        yield torch.tensor(tokens), torch.tensor(weights)


def fill(source: Iterator, tokenizer: Tokenizer, size: int) -> tuple[list[int], list[float]]:
    """One row of `size` tokens with the weight of each in the loss."""
    tokens: list[int] = []
    weights: list[float] = []
    while len(tokens) < size:
        pieces = chat_tokenizer.render(next(source))
        encoded = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        for (_, is_answer), encoding in zip(pieces, encoded, strict=True):
            tokens += encoding.ids
            weights += [1.0 if is_answer else QUESTION_WEIGHT] * len(encoding.ids)
    return tokens[:size], weights[:size]


def loss_of(model: Llama, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropy of the next token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1])
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: up, level, down to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (steps * DECAY))


def train(model: Llama, tokenizer: Tokenizer, steps: int) -> dict[str, float]:
    """Runs all steps, or those that a checkpoint says are missing; gives what the run cost."""
    BUILD.mkdir(parents=True, exist_ok=True)
    checkpoint = BUILD / "state.pt"
    opts = optimizers(model)
    full_rates = [opt.param_groups[0]["lr"] for opt in opts]
    start, cost = 0, {"wall_seconds": 0.0, "cpu_seconds": 0.0, "tokens": 0}
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start, cost = state["step"], state["cost"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    wall, cpu = time.perf_counter(), time.process_time()
    progress = tqdm(total=steps, initial=start, unit="step", mininterval=2)
    average = 0.0
    for step, (tokens, weights) in enumerate(batches(tokenizer, steps)):
        if step < start:  # the text is drawn again, so that a resumed run sees the same
            continue
        for opt, full in zip(opts, full_rates, strict=True):
            opt.param_groups[0]["lr"] = full * rate(step, steps)
        loss = loss_of(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        average = loss.item() if step == start else 0.95 * average + 0.05 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
        progress.update()
        cost["tokens"] += TOKENS_PER_STEP
        if (step + 1) % 50 == 0 or step + 1 == steps:
            cost["wall_seconds"] += time.perf_counter() - wall
            cost["cpu_seconds"] += time.process_time() - cpu
            wall, cpu = time.perf_counter(), time.process_time()
            state = {"step": step + 1, "model": model.state_dict(), "cost": cost}
            state["optimizers"] = [opt.state_dict() for opt in opts]
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    progress.close()
    return cost


def export(model: Llama, shape: Shape, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint in the layout of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    chat_tokenizer.save(tokenizer, folder)
    end, begin = (tokenizer.token_to_id(t) for t in (chat_tokenizer.END, chat_tokenizer.BEGIN))
    pad = tokenizer.token_to_id(chat_tokenizer.PAD)
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ids,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {**ids, "do_sample": False, "max_length": shape.max_position_embeddings}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Learns the tokenizer, trains, and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=embedded.path(), help="folder for the files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    tokenizer = chat_tokenizer.learn(SEED)
    shape = Shape(vocab_size=tokenizer.get_vocab_size())
    model = Llama(shape)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    cost = train(model, tokenizer, args.steps)
    export(model, shape, tokenizer, args.out)
    (BUILD / "state.pt").unlink()
    print("written to", args.out, json.dumps(cost))


if __name__ == "__main__":
    main()
