"""Every mode of quantization on one model with random weights: time to load, memory, speed, and how far logits move.

    python benchmarks/quantize.py --model Qwen2.5-0.5B
    python benchmarks/quantize.py --threads 1 --per-cpu    # what a busy machine can still tell

All modes are loaded into one process and take turns, so that ratios hold where absolute figures do not. Medians.

    load      seconds, from the files to a model that has taken its first step
    memory    of weights alone
    decode    tokens per second, one row; and eight at once, all rows together
    prefill   tokens per second of a prompt of 128
    moved     how far the logits lie from those of the unquantized model, relative to their size

"bf16 prepacked" is no quantization: `litgpt.prepack`, the same weights in the layout of oneDNN's products.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from litgpt import checkpoint, prepack, quantize, weights
from litgpt.config import Config
from litgpt.model import GPT, KVCache

PLAIN, PREPACKED = "bf16", "bf16 prepacked"
PROMPT, NEW = 128, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-0.5B", help="a registered name")
    parser.add_argument("--modes", nargs="*", default=[PREPACKED, *quantize.MODES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-cpu", action="store_true", help="seconds of processor time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.per_cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        directory = make_model(options.model, Path(folder) / "model")
        models: dict[str, GPT] = {}
        loads: dict[str, float] = {}
        for mode in [PLAIN, *options.modes]:
            begun = clock()
            models[mode] = load(directory, mode)
            models[mode](torch.tensor([[1]]))
            loads[mode] = clock() - begun
        runs: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in models}
        for _ in range(options.rounds):
            for mode, model in models.items():
                runs[mode].append((decode(model, 1, clock), decode(model, 8, clock), prefill(model, clock)))
        show(models, loads, runs)


def make_model(name: str, directory: Path) -> Path:
    config, generator = Config.from_name(name), torch.Generator().manual_seed(0)
    state = {
        key: (torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)).bfloat16()
        for key, shape in weights.expected(config).items()
    }
    return checkpoint.write(directory, config, state)


def load(directory: Path, mode: str) -> GPT:
    if mode in (PLAIN, PREPACKED):
        model = checkpoint.load_model(directory).eval()
        if mode == PREPACKED:
            prepack.prepack(model)
        return model
    return checkpoint.load_model(directory, quantize=mode).eval()


def decode(model: GPT, rows: int, clock: Callable[[], float]) -> float:
    """Tokens per second, all rows together."""
    cache = KVCache(model.config, rows, 64, dtype=model.wte.weight.dtype)
    ids = torch.full((rows, 32), 7)
    model(ids, torch.arange(32), cache=cache, last_only=True)
    times = []
    for position in range(32, 32 + NEW):
        begun = clock()
        model(ids[:, :1], torch.tensor([position]), cache=cache)
        times.append(clock() - begun)
    return rows / statistics.median(times)


def prefill(model: GPT, clock: Callable[[], float]) -> float:
    cache = KVCache(model.config, 1, PROMPT, dtype=model.wte.weight.dtype)
    begun = clock()
    model(torch.full((1, PROMPT), 7), torch.arange(PROMPT), cache=cache, last_only=True)
    return PROMPT / (clock() - begun)


def show(models: dict[str, GPT], loads: dict[str, float], runs: dict[str, list[tuple[float, ...]]]) -> None:
    ids = torch.arange(1, 33).unsqueeze(0)
    exact = models[PLAIN](ids).float()
    first = [statistics.median(column) for column in zip(*runs[PLAIN], strict=True)]
    print(f"{'':18s} {'load':>7s} {'memory':>9s} {'decode':>13s} {'8 rows':>13s} {'prefill':>14s} {'moved':>7s}")
    for mode, model in models.items():
        size = sum(t.nbytes for t in model.parameters())
        for module in model.modules():
            packed = getattr(module, "packed", None)
            size += 0 if packed is None else packed.nbytes
            if isinstance(module, quantize.QuantizedLinear):
                size += sum(t.nbytes for t in module.buffers(recurse=False))
        speeds = [statistics.median(column) for column in zip(*runs[mode], strict=True)]
        told = [f"{speed:7.1f} {speed / base:4.2f}x" for speed, base in zip(speeds, first, strict=True)]
        moved = ((model(ids).float() - exact).norm() / exact.norm()).item()
        columns = f"{loads[mode]:6.1f}s {size / 1e6:6.0f} MB {told[0]:>13s} {told[1]:>13s} {told[2]:>14s}"
        print(f"{mode:18s} {columns} {moved:7.3f}")


if __name__ == "__main__":
    main()
