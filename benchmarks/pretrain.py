"""Tokens per second and memory of training steps: our GPT and loss against `transformers` in a plain PyTorch loop.

    python benchmarks/pretrain.py --model pythia-14m --batch 4 --length 512 --precision fp32

Both train the same shape with the same optimizer, turn by turn in processes of their own, so that neither profits from
the other's memory. Printed: medians over the rounds, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round, after one that is not")
    parser.add_argument("--system", choices=tuple(SYSTEMS), help=argparse.SUPPRESS)  # one round of one system
    options = parser.parse_args()
    if options.system:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for _ in range(options.rounds):
        for name in SYSTEMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--system", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, rounds in found.items():
        speed, memory = (statistics.median(r[key] for r in rounds) for key in ("tokens_per_second", "peak_gb"))
        print(f"{name:<14}{speed:>10,.0f} tokens/s{memory:>8.2f} GB at the peak")
    pairs = zip(*found.values(), strict=True)
    ratio = statistics.median(ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs)
    print(f"litgpt / transformers: {ratio:.2f}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One round of one system."""
    import torch

    torch.manual_seed(0)
    step = SYSTEMS[options.system](options)
    step()
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": options.steps * options.batch * options.length / seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def litgpt_step(options: argparse.Namespace) -> Callable[[], None]:
    import torch

    from litgpt import GPT, Config

    model = GPT(Config.from_name(options.model)).to(dtype(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.length))

    def step() -> None:
        loss = model(ids, targets=ids)
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(options: argparse.Namespace) -> Callable[[], None]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from litgpt import Config

    described = Config.from_name(options.model).to_hf()
    theirs = AutoConfig.for_model(described.pop("model_type"), **described)
    model = AutoModelForCausalLM.from_config(theirs).to(dtype(options)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, theirs.vocab_size, (options.batch, options.length))

    def step() -> None:
        logits = model(ids).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def dtype(options: argparse.Namespace):  # a torch.dtype; torch is imported in the measured process only
    import torch

    return torch.bfloat16 if options.precision == "bf16" else torch.float32


SYSTEMS: dict[str, Callable[[argparse.Namespace], Callable[[], None]]] = {
    "litgpt": litgpt_step,
    "transformers": transformers_step,
}

if __name__ == "__main__":
    main()
