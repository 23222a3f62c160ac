"""Evaluation: LitGPT, `lm_eval --model hf` and LitGPT 0.5, on the same local tasks and the same random weights.

    python3 -m venv E && E/bin/pip install torch==2.13.0 "litgpt[extra]==0.5.13"
    python benchmarks/evaluate.py --litgpt-05 E/bin/python

A SmolLM2-135M answers questions with four options each, and prompts with 32 tokens; batch size and precision are the
same for all. Per system, in a process of its own, turn by turn; medians over the rounds:

    choice   questions per second, while the model works
    answers  new tokens per second, while the model works
    around   seconds for everything else but importing torch and lm-eval: own imports, loading, LitGPT 0.5's
             conversion, tokens, reports

The list of lm-eval's own tasks, which takes all of them as long, is left out. `--per-cpu` divides by seconds of
processor time: what a busy machine can still tell, best with `--threads 1`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW = 32  # tokens of an answer
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litgpt-05", type=Path, help="Python of an environment with LitGPT 0.5")
    parser.add_argument("--model", default="SmolLM2-135M", help="a registered name")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-cpu", action="store_true", help="by seconds of processor time")
    parser.add_argument("--work", type=Path, help="where model and tasks are made, or lie already")
    parser.add_argument("--system", help=argparse.SUPPRESS)  # one round of one system
    options = parser.parse_args()
    if options.system:
        print(json.dumps(measure(options)), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        if not (options.work / "model").is_dir():
            make_material(options)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Rounds of all systems that have an environment, and the table."""
    pythons = {"litgpt": Path(sys.executable), "lm_eval hf": Path(sys.executable), "litgpt 0.5": options.litgpt_05}
    found: dict[str, list[dict[str, float]]] = {name: [] for name, python in pythons.items() if python}
    for _ in range(options.rounds):
        for name in found:
            command = [str(pythons[name]), __file__, "--system", name, "--work", str(options.work)]
            command += [
                f"--{key}={getattr(options, key.replace('-', '_'))}"
                for key in ("precision", "batch-size", "questions", "prompts")
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(options.work / "cache")}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what runs from its sources would be compiled each time
            done = subprocess.run(
                command + (["--per-cpu"] if options.per_cpu else []),
                capture_output=True,
                text=True,
                env=environment,
                cwd=options.work,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if not lines:
                raise SystemExit(f"{name} did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            found[name].append(json.loads(lines[-1]))
            print(name, lines[-1], file=sys.stderr, flush=True)
    medians = {name: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for name, rounds in found.items()}
    clock = "processor time" if options.per_cpu else "time"
    print(f"{options.model} {options.precision}, {options.threads} threads, batch {options.batch_size}: by {clock}")
    for name, m in medians.items():
        print(f"{name:<12}{m['choice']:>8.2f} questions/s{m['answers']:>8.1f} tokens/s{m['around']:>8.2f} s around")
    for name in list(medians)[1:]:
        ratios = (f"{key} {medians['litgpt'][key] / medians[name][key]:.2f}" for key in ("choice", "answers"))
        print(f"litgpt / {name}: {', '.join(ratios)}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One round: all tasks, the model's work told apart from what is around it."""
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401
    import torch  # noqa: F401

    now = time.process_time if options.per_cpu else time.perf_counter
    run = SYSTEMS[options.system](options)
    spent = {"loglikelihood": 0.0, "generate_until": 0.0}

    def clock(model: type) -> None:
        for method in spent:
            setattr(model, method, clocked(getattr(model, method), method, spent, now))

    start = now()
    run(clock)
    around = now() - start - sum(spent.values())
    return {
        "choice": options.questions / spent["loglikelihood"],
        "answers": options.prompts * NEW / spent["generate_until"],
        "around": around,
    }


def clocked(
    method: Callable[..., Any], name: str, spent: dict[str, float], now: Callable[[], float]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        start = now()
        found = method(*arguments, **options)
        spent[name] += now() - start
        return found

    return timed


# The systems ----------------------------------------------------------------------------------------------------------

System = Callable[[Callable[[type], None]], Any]  # to run, told what clocks a class of models


def litgpt(options: argparse.Namespace) -> System:
    def run(clock: Callable[[type], None]) -> None:
        from litgpt.eval import evaluate
        from litgpt.eval.lm import EngineLM

        clock(EngineLM)
        evaluate.main(
            options.work / "model",
            tasks="choice,answers",
            include_path=options.work / "tasks",
            batch_size=options.batch_size,
            dtype=DTYPES[options.precision],
            device="cpu",
            out_dir=Path(tempfile.mkdtemp(dir=options.work)),
        )

    return run


def lm_eval_hf(options: argparse.Namespace) -> System:
    only_local(options)

    def run(clock: Callable[[type], None]) -> None:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        clock(HFLM)
        simple_evaluate(
            "hf",
            {"pretrained": str(options.work / "model"), "dtype": DTYPES[options.precision]},
            ["choice", "answers"],
            batch_size=options.batch_size,
            device="cpu",
            log_samples=False,
        )

    return run


def litgpt_05(options: argparse.Namespace) -> System:
    import shutil

    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # type: ignore[import-not-found]

    only_local(options)
    # its own directory, converted once before the clock starts
    directory = Path(tempfile.mkdtemp(dir=options.work)) / options.model
    shutil.copytree(options.work / "model", directory)
    (directory / "model_config.yaml").unlink(missing_ok=True)
    convert_hf_checkpoint(directory, model_name=options.model)

    def run(clock: Callable[[type], None]) -> None:
        from lm_eval.models.huggingface import HFLM

        from litgpt.eval.evaluate import convert_and_evaluate  # type: ignore[attr-defined]

        clock(HFLM)
        convert_and_evaluate(
            directory,
            tasks="choice,answers",
            batch_size=options.batch_size,
            device="cpu",
            dtype=DTYPES[options.precision],
            out_dir=directory / "evaluate",
        )

    return run


SYSTEMS: dict[str, Callable[[argparse.Namespace], System]] = {
    "litgpt": litgpt,
    "lm_eval hf": lm_eval_hf,
    "litgpt 0.5": litgpt_05,
}


def only_local(options: argparse.Namespace) -> None:
    """Make a list of tasks that somebody asks lm-eval for hold our two, and none of its own."""
    from lm_eval import evaluator, tasks

    local = functools.partial(tasks.TaskManager, include_path=str(options.work / "tasks"), include_defaults=False)
    evaluator.TaskManager = local  # type: ignore[misc,assignment]


# The material ---------------------------------------------------------------------------------------------------------


def make_material(options: argparse.Namespace) -> None:
    """A random model with a tokenizer, questions of about 100 tokens whose options have 2 to 12, and prompts."""
    import torch

    from litgpt import GPT, Config, checkpoint
    from litgpt.scripts import train_tokenizer

    pick = random.Random(1234)
    words = ["".join(pick.choices("etaoinshrdlucmfwypvbgk", k=pick.randint(2, 8))) for _ in range(600)]
    text = options.work / "text.txt"
    text.write_text("\n".join(" ".join(pick.choices(words, k=40)) for _ in range(800)))
    train_tokenizer.main([text], options.work / "tokenizer", vocab_size=1024)
    model = GPT(Config.from_name(options.model))
    model.init_weights(torch.Generator().manual_seed(0))
    weights = model.to(getattr(torch, DTYPES[options.precision])).state_dict()
    checkpoint.write(options.work / "model", model.config, weights, tokenizer_dir=options.work / "tokenizer")

    def some(least: int, most: int) -> str:
        return " ".join(pick.choices(words, k=pick.randint(least, most)))

    questions = [
        {"question": some(25, 60), "choices": [f" {some(1, 6)}" for _ in range(4)], "answer": pick.randrange(4)}
        for _ in range(options.questions)
    ]
    prompts = [{"question": some(20, 50), "choices": [" x"], "answer": 0} for _ in range(options.prompts)]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    answers = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["@@@@"], "max_gen_toks": NEW},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (options.work / "tasks").mkdir()
    for name, task, rows in (("choice", choice, questions), ("answers", answers, prompts)):
        data = options.work / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}}
        common |= {"test_split": "train", "doc_to_text": "{{question}}", "num_fewshot": 0}
        (options.work / "tasks" / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML


if __name__ == "__main__":
    main()
