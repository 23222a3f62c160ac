"""Loading and decoding: LitGPT, LitGPT 0.5, `transformers` and llama.cpp, from the same random weights.

    python3 -m venv E && E/bin/pip install torch==2.13.0 "litgpt[extra]==0.5.13"
    python3 -m venv L && L/bin/pip install llama-cpp-python gguf torch==2.13.0 transformers sentencepiece
    python benchmarks/generate.py --model SmolLM2-135M --litgpt-05 E/bin/python --llama-cpp L/bin/python

Per system, in a process of its own, turn by turn; medians over the rounds:

    ready    from the end of the imports until it can generate (LitGPT 0.5: its conversion, done once, is told apart)
    first    until the first of the tokens after a prompt of 512
    decode   tokens per second after the first, one prompt of 32 tokens; and eight at once, all rows together
    memory   anonymous memory once it has generated, and the peak with all mapped files

Greedy, and no end of text is heeded: all make the same number of tokens. The floor of decoding one row is the weights'
bytes over the measured speed of reading memory. `--per-cpu` tells decoding by processor time: what a busy machine can
still tell, best with `--threads 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LONG, SHORT, ROWS = 512, 32, 8
PREPACKED, COMPILED = "prepacked", "compiled"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", help="a registered name; SmolLM2-135M, Qwen2.5-0.5B")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--quantize", action="append", default=[], help="also LitGPT in this mode, such as torchao.int8"
    )
    parser.add_argument("--prepack", action="store_true", help="also LitGPT with `prepack`, for bf16")
    parser.add_argument("--compile", action="store_true", help="also LitGPT compiled, in each of these modes")
    parser.add_argument("--litgpt-05", type=Path, help="Python of an environment with LitGPT 0.5")
    parser.add_argument("--llama-cpp", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument(
        "--gguf", type=Path, help="the model as convert_hf_to_gguf.py of llama.cpp made it of WORK/model"
    )
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-cpu", action="store_true", help="decoding by seconds of processor time")
    parser.add_argument("--work", type=Path, help="where the model is made, or lies already")
    parser.add_argument("--system", help=argparse.SUPPRESS)  # one round of one system
    options = parser.parse_args()
    if options.system:
        print(json.dumps(measure(options)), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        options.work.mkdir(parents=True, exist_ok=True)
        if not (options.work / "model").is_dir():
            make_model(options)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Rounds of all systems that have an environment, and the table."""
    pythons: dict[str, Any] = {"litgpt": sys.executable}
    modes = [PREPACKED] * options.prepack + options.quantize
    modes += [f"{mode} {COMPILED}" for mode in modes] * options.compile
    pythons |= {f"litgpt {mode}": sys.executable for mode in modes}
    pythons |= {"litgpt 0.5": options.litgpt_05, "transformers": sys.executable}
    pythons |= {"llama.cpp": options.llama_cpp and options.gguf and options.llama_cpp}
    found: dict[str, list[dict[str, float]]] = {name: [] for name, python in pythons.items() if python}
    for _ in range(options.rounds):
        for name in found:
            found[name].append(run(options, name, str(pythons[name])))
    medians = {name: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for name, rounds in found.items()}
    reading = statistics.median(r["bandwidth"] for r in found["litgpt"])
    weights = sum(file.stat().st_size for file in (options.work / "model").glob("*.safetensors"))
    floor = reading / weights
    print(
        f"{options.model}, {options.precision}, {options.threads} threads; memory is read at {reading / 1e9:.1f} GB/s"
    )
    print(f"{'':<30}{'ready s':>9}{'first s':>9}{'1 row':>9}{'of floor':>9}{'8 rows':>9}{'anon GB':>9}{'peak GB':>9}")
    for name, m in medians.items():
        cells = [f"{m[key]:>9.2f}" for key in ("ready", "first")]
        cells += [f"{m['one']:>9.1f}", f"{m['one'] / floor:>9.0%}", f"{m['eight']:>9.1f}"]
        cells += [f"{m[key]:>9.2f}" for key in ("anonymous", "peak")]
        print(f"{name:<30}{''.join(cells)}")
    for name in list(medians)[1:]:
        ratios = [f"{key} {medians['litgpt'][key] / medians[name][key]:.2f}" for key in ("one", "eight")]
        print(f"litgpt / {name}: {', '.join(ratios)}")


def run(options: argparse.Namespace, name: str, python: str) -> dict[str, float]:
    command = [python, __file__, "--system", name, "--work", str(options.work), "--model", options.model]
    command += [f"--{key}={getattr(options, key)}" for key in ("precision", "new", "threads")]
    command += ["--per-cpu"] * options.per_cpu + ([f"--gguf={options.gguf}"] if options.gguf else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=options.work)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{name} did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


# One system in a process of its own -----------------------------------------------------------------------------------

Step = Iterator[Any]  # gives something each time every row has one more token
Decode = Callable[[list[list[int]], int], Step]  # (prompts, new tokens) -> steps


def measure(options: argparse.Namespace) -> dict[str, float]:
    """A round: loaded, warmed up, then each of the three timed."""
    name = options.system
    prepare = next(make for start, make in SYSTEMS.items() if name.startswith(start))
    load = prepare(options)  # its imports
    started = time.perf_counter()
    decode = load()
    ready = time.perf_counter() - started
    drain(decode([ids(SHORT)], 2))
    started = time.perf_counter()
    next(steps := decode([ids(LONG)], 2))
    first = time.perf_counter() - started
    drain(steps)
    values = {"ready": ready, "first": first}
    for key, rows in (("one", 1), ("eight", ROWS)):
        values[key] = decoded_per_second(decode, rows, options)
    values |= {"anonymous": anonymous_gb(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    return values | {"bandwidth": bandwidth()} if name == "litgpt" else values


def decoded_per_second(decode: Decode, rows: int, options: argparse.Namespace) -> float:
    prompts = [ids(SHORT + row, row) for row in range(rows)]
    drain(decode(prompts, 2))
    steps = decode(prompts, options.new)
    next(steps)
    clock = time.process_time if options.per_cpu else time.perf_counter
    started = clock()
    drain(steps)
    return rows * (options.new - 1) / (clock() - started)


def ids(count: int, seed: int = 0) -> list[int]:
    return [(7 * i * i + 13 * i + 101 * seed) % 1000 + 5 for i in range(count)]


def drain(steps: Step) -> None:
    for _ in steps:
        pass


def anonymous_gb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def bandwidth() -> float:
    """Bytes per second of reading memory in order, the best of some times."""
    import torch

    block = torch.ones(1 << 28, dtype=torch.uint8).view(torch.int64)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.numel() * 8 / min(times)


def litgpt(options: argparse.Namespace) -> Callable[[], Decode]:
    import torch

    from litgpt.adapters import load_model
    from litgpt.generate.engine import Engine
    from litgpt.generate.sampling import Sampling
    from litgpt.prepack import prepack

    words = options.system.split()[1:]
    compiles = COMPILED in words
    mode = next((word for word in words if word != COMPILED), None)

    def load() -> Decode:
        quantize = None if mode == PREPACKED else mode
        model = load_model(options.work / "model", dtype=getattr(torch, DTYPES[options.precision]), quantize=quantize)
        if mode == PREPACKED:
            prepack(model)
        engines = {}  # a compiled step computes all rows its engine may have

        def decode(prompts: list[list[int]], new: int) -> Step:
            most = len(prompts) if compiles else ROWS
            if most not in engines:
                room = LONG + ROWS + options.new if compiles else 64  # a cache that grows is compiled for again
                engines[most] = Engine(model, max_rows=most, compile=compiles, least=room)
            engine = engines[most]
            rows = [engine.submit(prompt, Sampling(temperature=0.0), max_new_tokens=new) for prompt in prompts]
            made = 0
            while engine.busy:
                engine.step()
                if (now := min(len(row.new) for row in rows)) > made:
                    made = now
                    yield made

        return decode

    return load


def litgpt_05(options: argparse.Namespace) -> Callable[[], Decode]:
    import shutil

    import torch
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # type: ignore[import-not-found]

    from litgpt import LLM
    from litgpt.generate.base import generate_fn  # type: ignore[attr-defined]

    directory = options.work / f"model-0.5-{options.precision}"
    if not (directory / "lit_model.pth").is_file():
        shutil.copytree(options.work / "model", directory, dirs_exist_ok=True)
        started = time.perf_counter()
        convert_hf_checkpoint(directory, model_name=options.model, dtype=DTYPES[options.precision])
        print(f"converted once in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    def load() -> Decode:
        llm = LLM.load(str(directory), distribute=None)
        llm.distribute(
            accelerator="cpu", devices=1, precision={"bf16": "bf16-true", "fp32": "32-true"}[options.precision]
        )
        model = llm.model
        model.max_seq_length = LONG + 64
        model.set_kv_cache(batch_size=1)
        model.eval()

        def decode(prompts: list[list[int]], new: int) -> Step:
            with torch.inference_mode():  # one after the other: it has no rows of unequal length
                for prompt in prompts:
                    limit = len(prompt) + new
                    tokens = generate_fn(
                        model, torch.tensor(prompt), limit, temperature=0.0, include_prompt=False, include_eos=True
                    )
                    yield from tokens

        return decode

    return load


def transformers(options: argparse.Namespace) -> Callable[[], Decode]:
    import queue
    import threading

    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    def load() -> Decode:
        model = AutoModelForCausalLM.from_pretrained(
            options.work / "model", dtype=getattr(torch, DTYPES[options.precision])
        ).eval()

        def decode(prompts: list[list[int]], new: int) -> Step:
            width = max(map(len, prompts))
            rows = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            made: queue.Queue[bool] = queue.Queue()

            def told(ids: Any, scores: Any) -> Any:  # it streams one row only, but asks this at every step
                made.put(True)
                return scores

            def work() -> None:
                with torch.inference_mode():
                    model.generate(
                        rows, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=new,
                        min_new_tokens=new, logits_processor=LogitsProcessorList([told]),
                    )  # fmt: skip
                made.put(False)

            threading.Thread(target=work).start()
            while made.get():
                yield True

        return decode

    return load


def llama_cpp(options: argparse.Namespace) -> Callable[[], Decode]:
    import llama_cpp  # type: ignore[import-not-found]
    import numpy as np

    def load() -> Decode:
        model = llama_cpp.llama_model_load_from_file(str(options.gguf).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = ROWS * 1024, ROWS, LONG
        settings.n_threads = settings.n_threads_batch = options.threads
        context = llama_cpp.llama_init_from_model(model, settings)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def decode(prompts: list[list[int]], new: int) -> Step:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch = llama_cpp.llama_batch_init(LONG * ROWS, 0, ROWS)

            def forward(rows: list[tuple[int, int, int, bool]]) -> list[int]:
                """(token, position, sequence, wants logits) of each -> the likeliest token for those that want one."""
                batch.n_tokens = len(rows)
                for i, (token, position, sequence, wants) in enumerate(rows):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                    batch.seq_id[i][0], batch.logits[i] = sequence, wants
                assert llama_cpp.llama_decode(context, batch) == 0
                pointers = [llama_cpp.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3]]
                return [int(np.ctypeslib.as_array(p, shape=(vocabulary,)).argmax()) for p in pointers]

            newest = []
            for row, prompt in enumerate(prompts):
                newest += forward([(t, i, row, i + 1 == len(prompt)) for i, t in enumerate(prompt)])
            yield newest
            for step in range(new - 1):
                newest = forward([(t, len(prompts[r]) + step, r, True) for r, t in enumerate(newest)])
                yield newest
            llama_cpp.llama_batch_free(batch)

        return decode

    return load


SYSTEMS: dict[str, Callable[[argparse.Namespace], Callable[[], Decode]]] = {
    "litgpt 0.5": litgpt_05,
    "litgpt": litgpt,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}


def make_model(options: argparse.Namespace) -> None:
    """Random weights in bf16 as a Hugging Face directory; with a tokenizer, which LitGPT 0.5 wants to see."""
    import torch

    from litgpt import GPT, Config, checkpoint
    from litgpt.scripts import train_tokenizer

    text = options.work / "text.txt"
    text.write_text(Path(__file__).read_text() * 4)
    train_tokenizer.main([text], options.work / "tokenizer", vocab_size=1024)
    model = GPT(Config.from_name(options.model))
    model.init_weights(torch.Generator().manual_seed(0))
    state = model.to(torch.bfloat16).state_dict()
    checkpoint.write(options.work / "model", model.config, state, tokenizer_dir=options.work / "tokenizer")


if __name__ == "__main__":
    main()
