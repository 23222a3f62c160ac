"""Real tokens per second and memory of finetuning: LitGPT, LitGPT 0.5 and peft with `transformers.Trainer`.

    python3 -m venv E && E/bin/pip install torch==2.13.0 "litgpt[extra]==0.5.13"
    python3 -m venv F && F/bin/pip install torch==2.13.0 transformers peft accelerate bitsandbytes
    python benchmarks/finetune.py --method lora --litgpt-05 E/bin/python --peft F/bin/python

All train the same random SmolLM2-135M on the same 200 samples of 46 to 492 tokens, by their own command or trainer with
the same batch, learning rate and LoRA (r 8, alpha 16, on query and value), turn by turn in processes of their own. One
clock for all: an optimizer's step ends a step, and the tokens that enter the embedding and are no padding are real.
Printed: medians over the rounds, and ratios to LitGPT 0.5 and to the best peer.

`--per-cpu` divides by the seconds of processor time instead of the clock's: what a busy machine can still tell, best
with `--threads 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORTEST, LONGEST, SAMPLES = 46, 492, 200
PAD, START, END = "<pad>", "<s>", "</s>"  # ids 0, 1, 2: padding is no token of any text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full", "qlora"), default="lora")
    parser.add_argument("--litgpt-05", type=Path, help="Python of an environment with LitGPT 0.5")
    parser.add_argument("--peft", type=Path, help="Python of an environment with transformers and peft")
    parser.add_argument("--batch", type=int, default=8, help="samples of an optimizer step, and at once")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a round")
    parser.add_argument("--warm", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-cpu", action="store_true", help="tokens per second of processor time")
    parser.add_argument("--work", type=Path, help="where model and data are made, or lie already")
    parser.add_argument("--system", help=argparse.SUPPRESS)  # one round of one system
    options = parser.parse_args()
    if options.system:
        SYSTEMS[options.system](options, Clock(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        if not (options.work / "model").is_dir():
            make_material(options.work)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Rounds of all systems that have an environment, and the table."""
    pythons = {"litgpt": Path(sys.executable), "litgpt 0.5": options.litgpt_05}
    pythons |= dict.fromkeys(("peft", "peft, packed"), options.peft)
    if options.method == "qlora":
        del pythons["litgpt 0.5"]  # it refuses bitsandbytes on a CPU
    found: dict[str, list[dict[str, float]]] = {name: [] for name, python in pythons.items() if python}
    for _ in range(options.rounds):
        for name in found:
            command = [str(pythons[name]), __file__, "--system", name, "--work", str(options.work)]
            command += [f"--{key}={getattr(options, key)}" for key in ("method", "batch", "steps", "warm")]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=options.work)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if not lines:
                raise SystemExit(f"{name} did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            found[name].append(json.loads(lines[-1]))
            print(name, lines[-1], file=sys.stderr, flush=True)
    rate = "tokens_per_cpu_second" if options.per_cpu else "tokens_per_second"
    speeds = {name: statistics.median(r[rate] for r in rounds) for name, rounds in found.items()}
    print(f"{options.method}, {options.threads} threads, batch {options.batch}: real {rate.replace('_', ' ')}")
    for name, rounds in found.items():
        peak, padding = (statistics.median(r[key] for r in rounds) for key in ("peak_gb", "padding"))
        print(f"{name:<14}{speeds[name]:>8,.0f}{peak:>8.2f} GB at the peak{padding:>8.0%} padding")
    for name in list(found)[1:]:
        print(f"litgpt / {name}: {speeds['litgpt'] / speeds[name]:.2f}")


class Clock:
    """Ends the process after the last step, having said what the timed ones came to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.warm, self.last = options.warm, options.warm + options.steps
        self.real = self.computed = 0
        self.marks: list[tuple[float, float, int, int]] = []

    def start(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        plain = torch.nn.Embedding.forward

        def counted(module: Any, ids: Any) -> Any:
            if module.training and torch.is_grad_enabled():
                self.real, self.computed = self.real + int((ids != 0).sum()), self.computed + ids.numel()
            return plain(module, ids)

        torch.nn.Embedding.forward = counted  # type: ignore[method-assign]
        register_optimizer_step_post_hook(lambda *_: self.mark())

    def mark(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((time.perf_counter(), used.ru_utime + used.ru_stime, self.real, self.computed))
        if len(self.marks) < self.last:
            return
        seconds, cpu, real, computed = (b - a for a, b in zip(self.marks[self.warm - 1], self.marks[-1], strict=True))
        values = {
            "tokens_per_second": real / seconds,
            "tokens_per_cpu_second": real / cpu,
            "padding": 1 - real / computed,
            "peak_gb": used.ru_maxrss * 1024 / 1e9,
        }
        print(json.dumps(values), flush=True)
        os._exit(0)


# The systems ----------------------------------------------------------------------------------------------------------


def litgpt(options: argparse.Namespace, clock: Clock) -> None:
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.finetune import full, lora

    clock.start()
    command: Callable[..., None] = full.setup if options.method == "full" else lora.setup
    quantized = {"quantize": "bnb.nf4"} if options.method == "qlora" else {}
    command(
        checkpoint_dir=options.work / "model",
        out_dir=Path(tempfile.mkdtemp(dir=options.work)),
        precision="bf16-true",
        **quantized,
        data=JSON(options.work / "data.json", val_split_fraction=0.01, prompt_style="default", num_workers=0),
        train=TrainArgs(**training(options), max_seq_length=512),
        eval=EvalArgs(interval=10**6, final_validation=False),
    )


def litgpt_05(options: argparse.Namespace, clock: Clock) -> None:
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.prompts import Default

    directory = options.work / "model-0.5"
    if not (directory / "lit_model.pth").is_file():
        import shutil

        from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

        shutil.copytree(options.work / "model", directory, dirs_exist_ok=True)
        convert_hf_checkpoint(directory, model_name="SmolLM2-135M")
    if options.method == "full":
        from litgpt.finetune.full import setup
    else:
        from litgpt.finetune.lora import setup
    clock.start()
    setup(
        checkpoint_dir=directory,
        out_dir=Path(tempfile.mkdtemp(dir=options.work)),
        precision="bf16-true",
        data=JSON(options.work / "data.json", val_split_fraction=0.01, prompt_style=Default(), num_workers=0),
        train=TrainArgs(**training(options), log_interval=10**6),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, final_validation=False),
    )


def training(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "global_batch_size": options.batch,
        "micro_batch_size": options.batch,
        "lr_warmup_steps": 1,
        "epochs": 1,
        "max_steps": options.steps + options.warm + 1,
        "save_interval": 10**6,
    }


def peft(options: argparse.Namespace, clock: Clock, *, packed: bool = False) -> None:
    import torch
    import transformers

    quantized = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    extra = {"quantization_config": transformers.BitsAndBytesConfig(**quantized)} if options.method == "qlora" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.work / "model", dtype=torch.bfloat16, attn_implementation="sdpa", **extra
    )
    if options.method != "full":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.work / "model")
    rows = []
    for record in json.loads((options.work / "data.json").read_text()):
        ids = tokenizer(record["instruction"]).input_ids + tokenizer(record["output"]).input_ids + [2]
        rows.append({"input_ids": ids, "labels": list(ids)})
    if packed:
        collator = transformers.DataCollatorWithFlattening()
    else:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest")
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=options.work),
        per_device_train_batch_size=options.batch,
        max_steps=options.steps + options.warm + 1,
        learning_rate=3e-4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    clock.start()
    transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()


def peft_packed(options: argparse.Namespace, clock: Clock) -> None:
    peft(options, clock, packed=True)


SYSTEMS: dict[str, Callable[[argparse.Namespace, Clock], None]] = {
    "litgpt": litgpt,
    "litgpt 0.5": litgpt_05,
    "peft": peft,
    "peft, packed": peft_packed,
}

# What they train on ---------------------------------------------------------------------------------------------------


def make_material(folder: Path) -> None:
    """A random model with a small tokenizer, as a Hugging Face directory, and `data.json`."""
    import torch

    from litgpt import GPT, Config, Tokenizer, checkpoint

    pick = random.Random(1234)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(pick.choices(letters, range(26, 0, -1), k=pick.randint(2, 9))) for _ in range(1500)]
    texts = [" ".join(pick.choices(vocabulary, k=50)) for _ in range(2000)]
    make_tokenizer(folder / "tokenizer", texts)
    model = GPT(Config.from_name("SmolLM2-135M"))
    model.init_weights(torch.Generator().manual_seed(0))
    weights = model.to(torch.bfloat16).state_dict()
    checkpoint.write(folder / "model", model.config, weights, tokenizer_dir=folder / "tokenizer")
    tokenizer = Tokenizer(folder / "model")
    records = [make_record(pick, vocabulary, lambda text: len(tokenizer.encode(text))) for _ in range(SAMPLES)]
    (folder / "data.json").write_text(json.dumps(records))


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": START,
        "eos_token": END,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def make_record(pick: random.Random, vocabulary: list[str], count: Callable[[str], int]) -> dict[str, str]:
    """An instruction with as long an answer as makes a drawn number of tokens in all."""
    wanted = pick.randint(SHORTEST, LONGEST)
    instruction = " ".join(pick.choices(vocabulary, k=pick.randint(6, 24)))
    answer = pick.choices(vocabulary, k=520)
    low, high = 1, len(answer)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count(instruction) + count(" ".join(answer[:middle])) + 1 <= wanted
        low, high = (middle, high) if fits else (low, middle - 1)
    return {"instruction": instruction, "input": "", "output": " ".join(answer[:low])}


if __name__ == "__main__":
    main()
