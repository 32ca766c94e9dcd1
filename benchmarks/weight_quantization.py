"""What int8 weights lose: `python -m benchmarks.weight_quantization`.

Prints the tables of docs/weight-quantization.md. Everything is computed in float32 but for the row
of bfloat16, which shows what its rounding alone does. No figure depends on the load of the machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.kv_quantization import chats, embedded_config, logits
from benchmarks.shapes import LLAMA_56M
from engine.llm import LLM
from kernels.dispatch import backend
from kernels.int8 import LARGEST, dequantize, quantize
from models import embedded, registry
from models.decoder import CausalLM
from scheduler.request import SamplingParams

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """How the weights of a model are kept."""

    dtype: torch.dtype
    layers: bool
    head: bool

    def apply(self, model: CausalLM) -> None:
        """Marks what becomes int8; before `prepare`."""
        if self.layers:
            for linear in model.linears():
                linear.quantize()
        if self.head:
            model.head.quantize()


STANDARD = Variant(torch.float32, layers=False, head=False)
VARIANTS = {
    "bfloat16": Variant(torch.bfloat16, layers=False, head=False),
    "int8, all but the head": Variant(torch.float32, layers=True, head=False),
    "int8, the head only": Variant(torch.float32, layers=False, head=True),
    "int8": Variant(torch.float32, layers=True, head=True),
}


# ---------------------------------------------------------------------- scales


def absmax(weight: Tensor) -> Tensor:
    """The one that is served."""
    return dequantize(*quantize(weight))


def one_scale(weight: Tensor) -> Tensor:
    """One scale for the whole matrix."""
    scale = weight.abs().max() / LARGEST
    return (weight / scale).round() * scale


def clipped(weight: Tensor) -> Tensor:
    """The scale of each output that makes its squared error smallest, of 41 from 0.8 to 1."""
    best = weight.new_full((len(weight), 1), torch.inf)
    found = torch.zeros_like(weight)
    for share in torch.linspace(0.8, 1, 41):
        scale = (weight.abs().amax(1, keepdim=True) * share / LARGEST).clamp_(min=1e-30)
        made = (weight / scale).round().clamp(-LARGEST, LARGEST) * scale
        error = (made - weight).square().sum(1, keepdim=True)
        found, best = torch.where(error < best, made, found), torch.minimum(error, best)
    return found


def grouped(weight: Tensor) -> Tensor:
    """A scale for every 64 inputs of an output."""
    inputs = weight.shape[1] // 64 * 64
    return absmax(weight[:, :inputs].reshape(-1, 64)).view(len(weight), inputs)


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "one scale": one_scale,
    "per output": absmax,
    "per output, clipped": clipped,
    "per 64 inputs": grouped,
}


def show_scales(matrices: dict[str, list[Tensor]]) -> None:
    """Root mean square error over that of the weights, median over matrices [smallest, largest]."""
    print("| weights | " + " | ".join(CHOICES) + " |\n" + "|---" * (len(CHOICES) + 1) + "|")
    for name, weights in matrices.items():
        cells = []
        for choice in CHOICES.values():
            errors = [100 * relative(choice(w), w) for w in weights]
            cells.append(
                f"{statistics.median(errors):.2f} % [{min(errors):.2f}, {max(errors):.2f}]"
            )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def matrices(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Of the embedded model, and random ones: the last have every 32nd input 10 times as large."""
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(3, 1024, 1024, generator=rng)
    outliers = random.clone()
    outliers[..., ::32] *= 10
    trained = [t.float() for name, t in tensors.items() if t.ndim == 2 and "layers" in name]
    return {
        "embedded, layers": trained,
        "embedded, head": [tensors["model.embed_tokens.weight"].float()],
        "normal": list(random),
        "outlier channels": list(outliers),
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want[:, : got.shape[1]]).norm() / want[:, : got.shape[1]].norm())


# ---------------------------------------------------------------------- logits


@torch.inference_mode()
def show_logits(make: Callable[[Variant], CausalLM], texts: list[Tensor]) -> None:
    """Teacher forcing: every position sees the same tokens."""
    targets = torch.cat([text[1:] for text in texts])
    want = scores(make(STANDARD), texts)
    standard = want.log_softmax(-1)
    best, loss = standard.argmax(-1), nll(standard, targets)
    print(
        f"| weights ({len(best):,} tokens) | NLL, nats per token | against float32 | greedy |",
        end="",
    )
    print(" mean KL | error of logits |\n|---|---|---|---|---|---|")
    print(f"| float32 | {loss:.4f} | | | | |")
    for name, variant in VARIANTS.items():
        got = scores(make(variant), texts)
        other = got.log_softmax(-1)
        same = 100 * (other.argmax(-1) == best).double().mean()
        kl = (standard.exp() * (standard - other)).sum(-1).mean()
        more = nll(other, targets) - loss
        print(
            f"| {name} | {loss + more:.4f} | {more:+.5f} | {same:.2f} % | {kl:.1e} |"
            f" {100 * relative(got, want):.2f} % |",
            flush=True,
        )


def scores(model: CausalLM, texts: list[Tensor]) -> Tensor:
    """Logits behind every token that has a next one."""
    numbers = str(model.embed.weight.dtype).removeprefix("torch.")
    return torch.cat([logits(model, text[:-1], numbers, backend(CPU)) for text in texts])


def nll(standard: Tensor, targets: Tensor) -> float:
    return float(-standard.gather(1, targets[:, None]).mean())


# ---------------------------------------------------------------------- answers


def show_answers(count: int, tokens: int) -> None:
    """Greedy answers of the embedded model: where they part from those in float32."""
    prompts = [text[: 20 + i % 60].tolist() for i, text in enumerate(chats(count * 100, 100))]
    print(f"| weights ({count} answers of {tokens} tokens) | the same | tokens before they part |")
    print("|---|---|---|")
    want = answers(prompts, tokens, "float32", "none")
    for dtype, quantization in (("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8")):
        got = answers(prompts, tokens, dtype, quantization)
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(got, want, strict=True)]
        parts = [next((i for i, (a, b) in enumerate(p) if a != b), tokens) for p in pairs]
        same = 100 * statistics.mean(part == tokens for part in parts)
        name = f"int8, {dtype} arithmetic" if quantization == "int8" else dtype
        print(f"| {name} | {same:.1f} % | {statistics.mean(parts):.1f} on average |", flush=True)


def answers(
    prompts: list[list[int]], tokens: int, dtype: str, quantization: str
) -> list[list[int]]:
    llm = LLM("embedded", dtype=dtype, quantization=quantization, device="cpu", log_level="error")
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [made.outputs[0].token_ids for made in llm.generate(prompts, sampling)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--only", choices=("scales", "logits", "answers"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensors = load_file(Path(embedded.path(), "model.safetensors"))

    def trained(variant: Variant) -> CausalLM:
        model = registry.build(embedded_config(), variant.dtype, CPU)
        for name, tensor in model.checkpoint_tensors().items():
            tensor.copy_(tensors[name])
        variant.apply(model)
        model.prepare()
        return model

    def untrained(variant: Variant) -> CausalLM:
        model = registry.build(registry.parse_config(LLAMA_56M), variant.dtype, CPU)
        rng = torch.Generator().manual_seed(0)
        for tensor in model.checkpoint_tensors().values():
            noise = torch.randn(tensor.shape, generator=rng)
            tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else noise * 0 + 1)
        variant.apply(model)
        model.prepare()
        return model

    print(f"torch {torch.__version__}, {options.threads} threads")
    if options.only in (None, "scales"):
        print("\nError of the weights\n")
        show_scales(matrices(tensors))
    if options.only in (None, "logits"):
        print("\nThe embedded model, chats that it has not been trained on\n")
        show_logits(trained, chats(options.tokens))
        print("\nA random model of 56 million parameters, random tokens\n")
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(3, LLAMA_56M["vocab_size"], (options.tokens // 5,), generator=rng)
        show_logits(untrained, list(ids.split(500)))
    if options.only in (None, "answers"):
        print("\nGreedy answers of the embedded model\n")
        show_answers(options.answers, 64)


if __name__ == "__main__":
    main()
