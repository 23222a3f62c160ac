"""The parts of a model, one on each device, are the model: summed in threads of one process, and by two processes."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from litgpt import adapters, checkpoint, launch
from litgpt.api import LLM
from litgpt.config import Config
from litgpt.errors import InputError, MachineError
from litgpt.generate import base, tp
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.launch import Machine
from litgpt.methods.adapter import Adapter
from litgpt.methods.lora import LoRA
from litgpt.model import GPT
from litgpt.placement.tensor_parallel import Cut, TensorParallel, part_of
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20) % 96
MIXED: dict[str, Config] = {
    "whole-norms-shared-groups": shrunk("OLMo-2-1124-7B", n_query_groups=2),
    "whole-layer-norms": shrunk("OLMo-2-1124-7B", norm_class_name="LayerNorm"),
    "tied-head-with-bias": shrunk("phi-2", tie_embeddings=True),
    "odd-vocabulary": shrunk("pythia-14m", padded_vocab_size=129),
    "odd-tied-vocabulary": shrunk("Llama-3.2-1B", padded_vocab_size=131),
    "parallel-with-norms-between": shrunk("pythia-14m", post_attention_norm=True, post_mlp_norm=True),
    "clipped": shrunk("OLMo-7B-hf", clip_qkv=0.05),
}


# Threads of one process ----------------------------------------------------------------------------------------------


@dataclass
class Meeting:
    """Where threads lay down what they have, and take up what all have."""

    size: int
    table: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True)
class ThreadRanks:
    rank: int
    meeting: Meeting

    @property
    def size(self) -> int:
        return self.meeting.size

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.all(x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.all(x), dim=-1)

    def all(self, x: Tensor) -> list[Tensor]:
        self.meeting.table[self.rank] = x
        self.meeting.barrier.wait()
        found = [t.clone() for t in self.meeting.table]
        self.meeting.barrier.wait()
        return found


def on_ranks(n: int, do: Callable[[TensorParallel], Any]) -> list[Any]:
    """What `do` gives on each of `n` ranks, which are threads."""
    meeting, results = Meeting(n), [None] * n

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = do(TensorParallel(ThreadRanks(rank, meeting), CPU, 1 << 40))
        except BaseException as error:
            results[rank] = error  # type: ignore[call-overload]
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [r for r in results if isinstance(r, BaseException) and not isinstance(r, threading.BrokenBarrierError)]
    if errors:
        raise errors[0]
    return results


def tensors_of(model: GPT) -> list[tuple[str, Tensor]]:
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    return [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]


def logits_of(model: GPT) -> Tensor:
    """Without a cache, and a prompt read and continued with one: (2, 2, 20, V)."""
    cache = model.new_cache(2)
    read = model(IDS[:, :13], cache=cache)
    return torch.stack((model(IDS), torch.cat((read, model(IDS[:, 13:], torch.arange(13, 20), cache=cache)), dim=1)))


@pytest.mark.parametrize(("name", "n"), [*((name, 4) for name in CONFIGS), *((name, 2) for name in MIXED)])
def test_the_sum_over_parts_is_the_whole(name: str, n: int) -> None:
    config = (CONFIGS | MIXED)[name]
    whole = random_gpt(config)

    def run(placement: TensorParallel) -> Tensor:
        return logits_of(checkpoint.build_model(config, tensors_of(whole), torch.float32, placement).eval())

    first, *others = on_ranks(n, run)
    with torch.inference_mode():
        assert_close(first, logits_of(whole), rtol=1e-4, atol=5e-5)
    assert all(torch.equal(first, other) for other in others)  # ranks never disagree, not in a bit


def test_fused_queries_keys_and_values_are_cut_by_heads() -> None:
    config = shrunk("Llama-3.2-1B", n_head=4, n_query_groups=2, head_size=2)
    rows = torch.arange(16)  # 4 heads of queries, 2 of keys, 2 of values, of 2 rows each
    cuts = [Cut(config, rank, 2)("transformer.h.0.attn.qkv.weight", rows).tolist() for rank in range(2)]
    assert cuts == [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]
    cuts = [Cut(config, rank, 4)("transformer.h.0.attn.qkv.weight", rows).tolist() for rank in range(4)]
    assert cuts == [[0, 1, 8, 9, 12, 13], [2, 3, 8, 9, 12, 13], [4, 5, 10, 11, 14, 15], [6, 7, 10, 11, 14, 15]]


def test_the_cache_of_a_part_holds_its_own_heads() -> None:
    config = CONFIGS["mistral"]
    whole = random_gpt(config)

    def run(placement: TensorParallel) -> int:
        return checkpoint.build_model(config, tensors_of(whole), torch.float32, placement).new_cache(3).nbytes

    assert on_ranks(2, run) == [whole.new_cache(3).nbytes // 2] * 2


def test_rows_are_read_where_they_lie_in_the_file(tmp_path: Path) -> None:
    config = shrunk("Llama-3.2-1B")
    checkpoint.write(tmp_path / "ck", config, random_gpt(config))
    placement = TensorParallel(ThreadRanks(1, Meeting(2)), CPU, 1 << 40)
    model = checkpoint.load_model(tmp_path / "ck", placement=placement)
    weight = model.get_parameter("transformer.h.0.mlp.fc_1.weight")
    assert weight.shape == (24, config.n_embd)
    assert weight.untyped_storage().nbytes() == 2 * weight.nbytes  # the whole tensor, on the file: nothing was copied
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("mode", "error"), [("torchao.int8", 0.02), ("torchao.int4", 0.3)])
def test_parts_are_quantized_after_they_are_cut(mode: str, error: float, tmp_path: Path) -> None:
    config = shrunk("Qwen2.5-0.5B", n_embd=64, n_head=4, head_size=16, n_query_groups=2, intermediate_size=128)
    whole = random_gpt(config)
    checkpoint.write(tmp_path / "ck", config, whole)

    def run(placement: TensorParallel) -> tuple[Tensor, int]:
        model = checkpoint.load_model(tmp_path / "ck", quantize=mode, placement=placement).eval()
        return logits_of(model), sum(t.nbytes for t in model.state_dict().values())

    (logits, size), (others, _) = on_ranks(2, run)
    with torch.inference_mode():
        exact = logits_of(whole)
    assert torch.equal(logits, others)
    assert (logits - exact).norm() / exact.norm() < error
    assert size < sum(t.nbytes for _, t in tensors_of(whole)) * 0.8


def test_a_lora_adapter_is_merged_before_its_base_is_cut(tmp_path: Path) -> None:
    config = shrunk("Llama-3.2-1B")
    model = random_gpt(config)
    checkpoint.write(tmp_path / "base", config, model)
    method = LoRA(r=4, mlp=True, projection=True, key=True, head=True, dropout=0.0)
    method.attach(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.write(tmp_path / "lora", config, method, model, base=tmp_path / "base", merged=False)
    with torch.inference_mode():
        truth = logits_of(adapters.load_model(tmp_path / "lora"))
    found = adapters.find(tmp_path / "lora")
    assert found is not None
    logits = on_ranks(2, lambda placement: logits_of(adapters.load_adapted(found, placement=placement)))
    assert_close(logits[0], truth, rtol=1e-4, atol=5e-5)


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    config = shrunk("Llama-3.2-1B")
    model = random_gpt(config)
    checkpoint.write(tmp_path / "base", config, model)
    Adapter(start_layer=1).attach(model)
    adapters.write(tmp_path / "a", config, Adapter(start_layer=1), model, base=tmp_path / "base", merged=False)
    found = adapters.find(tmp_path / "a")
    assert found is not None
    with pytest.raises(InputError, match=r"kind adapter cannot be cut.*generate_sequentially"):
        on_ranks(2, lambda placement: adapters.load_adapted(found, placement=placement))


@pytest.mark.parametrize(
    ("config", "n", "said"),
    [
        (shrunk("Llama-3.2-1B"), 3, r"3 devices: n_head 4 is no multiple of 3; use 2, or"),
        (
            shrunk("Llama-3.2-1B", intermediate_size=49),
            2,
            r"2 devices: intermediate_size 49 is no multiple of 2; use one",
        ),
        (shrunk("Qwen3-30B-A3B", moe_intermediate_size=21), 2, r"moe_intermediate_size 21 is no multiple of 2"),
        (shrunk("Llama-3.2-1B", n_head=12, n_query_groups=3, intermediate_size=48), 2, r"n_query_groups 3 is neither"),
    ],
)
def test_counts_that_do_not_divide_are_named_with_the_number_of_devices(config: Config, n: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        part_of(config, n)
    assert "generate_sequentially" in str(caught.value)


def test_a_part_that_is_too_large_for_its_device_is_refused_before_it_is_read() -> None:
    config = Config.from_name("Llama-3.1-8B")
    small = TensorParallel(ThreadRanks(0, Meeting(8)), CPU, room=2_000_000_000)
    with pytest.raises(InputError, match=r"big, cut for 8 devices, on each of them needs about .* GB.*2\.0 GB is free"):
        small.require_fit(config, torch.bfloat16, 300, "big")
    TensorParallel(ThreadRanks(0, Meeting(8)), CPU, room=4_000_000_000).require_fit(config, torch.bfloat16, 300, "big")


# Two processes -------------------------------------------------------------------------------------------------------

TALKING = ("llama", "falcon", "gemma2", "mixtral", "olmo2", "deepseek_v3")
PROMPTS = [[5, 6, 7], list(range(40, 58)), [9], [*range(40, 55), 3, 2], [5, 6, 7, 8, 9]]


def decoded(model: GPT) -> dict[str, Any]:
    """Rows, greedy and sampled, that begin and end at different times; the cache grows, prefixes are taken over."""
    engine = Engine(model, max_rows=3, n_tokens=90)
    rows = [engine.submit(ids, Sampling(0), max_new_tokens=5 + 2 * i) for i, ids in enumerate(PROMPTS)]
    rows += engine.submit_samples(PROMPTS[1], [Sampling(seed=i) for i in range(2)], max_new_tokens=4)
    for _ in range(5):
        engine.step()
    engine.cancel(rows[0])
    while engine.busy:
        engine.step()
    again = engine.submit(PROMPTS[1] + rows[1].new[:4], Sampling(0), max_new_tokens=4)
    while engine.busy:
        engine.step()
    rows.append(engine.submit([1] * 60, Sampling(0), max_new_tokens=4))
    with pytest.raises(InputError, match="do not fit"):
        engine.submit([1] * 60, max_new_tokens=9)
    while engine.busy:
        engine.step()
    scores = next(engine.score([(PROMPTS[1], [3, 4])]))
    return {
        "tokens": [row.new for row in [*rows[1:], again]],
        "reused": again.reused,
        "scores": [round(score.logprob, 3) for score in scores],
    }


def do_all(ranks: launch.PlainRanks, job: dict[str, Any]) -> dict[str, Any]:
    """Every model, then every command."""
    placement, answers = TensorParallel.here(ranks.device), {}
    for name, directory in job["models"].items():
        model = checkpoint.load_model(directory, placement=placement).eval()
        if ranks.global_rank:
            placement.follow(model)
        else:
            with torch.inference_mode():
                answers[name] = (logits_of(model), decoded(model) if name in TALKING else None)
            placement.release()
    for arguments in job["commands"]:
        tp.story(ranks, arguments)
    return answers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: checkpoint.write(folder / name, config, random_gpt(config)) for name, config in CONFIGS.items()}


def test_two_processes_say_what_one_says(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    config = shrunk("Qwen2.5-0.5B", vocab_size=300, padded_vocab_size=320, block_size=256)
    talker = checkpoint.write(tmp_path / "talker", config, random_gpt(config), tokenizer_dir=tokenizer)
    (tmp_path / "prompts.txt").write_text("The river\n\nThe mill ran\nA\n")
    told: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 8, "batch_size": 3, "stop": ["e"]}
    commands: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda on, precision, story, job, strategy, remedy: commands.append(job))
    for options in ({"prompt": "The river"}, {"prompts_file": tmp_path / "prompts.txt"}):
        tp.main(talker, **told, **options, devices=2)  # type: ignore[arg-type]
    monkeypatch.undo()
    capfd.readouterr()

    answers = launch.launch(
        Machine("cpu", 2), "32-true", do_all, {"models": models, "commands": commands}, strategy=launch.PLAIN
    )

    shown = capfd.readouterr()
    for options in ({"prompt": "The river"}, {"prompts_file": tmp_path / "prompts.txt"}):
        base.main(talker, **told, **options)  # type: ignore[arg-type]
    assert shown.out == capfd.readouterr().out  # once, and the same
    assert shown.err.count("tokens/s") == 2
    for name, directory in models.items():
        model = checkpoint.load_model(directory).eval()
        logits, tokens = answers[name]
        with torch.inference_mode():
            assert_close(logits, logits_of(model), rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert tokens == (decoded(model) if name in TALKING else None), name
    assert any(tokens["reused"] for name, (_, tokens) in answers.items() if name in TALKING)


def refuse(ranks: launch.PlainRanks, job: None) -> None:
    """Rank 1 cannot take part, while rank 0 goes on to tell it something."""
    placement = TensorParallel.here(ranks.device)
    if ranks.global_rank:
        raise InputError("cuda:1 is too small")
    assert placement.mirror is not None
    for number in range(10_000):
        placement.mirror.tell("new", number, 1, 1)


def test_what_keeps_another_rank_from_its_part_is_said() -> None:
    with pytest.raises(InputError, match=r"^cuda:1 is too small$"):
        launch.launch(Machine("cpu", 2), "32-true", refuse, None, strategy=launch.PLAIN)


def test_one_device_is_an_ordinary_generate(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    config = shrunk("Qwen2.5-0.5B", vocab_size=300, padded_vocab_size=320, block_size=256)
    talker = checkpoint.write(tmp_path / "talker", config, random_gpt(config), tokenizer_dir=tokenizer)
    tp.main(talker, "The river", max_new_tokens=5, devices=1)
    shown = capfd.readouterr()
    base.main(talker, "The river", max_new_tokens=5)
    assert shown.out == capfd.readouterr().out
    assert "note: one device" in shown.err


# LLM -----------------------------------------------------------------------------------------------------------------


def test_an_llm_answers_scores_and_embeds_from_two_processes_as_from_one(tmp_path: Path) -> None:
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    config = shrunk("Qwen2.5-0.5B", vocab_size=300, padded_vocab_size=320, block_size=256)
    checkpoint.write(tmp_path / "ck", config, random_gpt(config), tokenizer_dir=tokenizer)
    llm = LLM.load(tmp_path / "ck")

    def said() -> list[Any]:
        stream = llm.generate("The mill", max_new_tokens=8, temperature=0, stream=True)
        first = next(stream)
        answers = llm.generate(["The river", "A"], max_new_tokens=6, temperature=0.7, seed=3, n=2)
        stream.close()
        return [first, answers, [round(x, 3) for x in llm.score("A small model").logprobs]]

    one, vector, logits = said(), llm.embeddings(["The river", "A"]), llm(IDS)
    llm.distribute("cpu", 2, generate_strategy="tensor_parallel")
    assert said() == one
    assert_close(llm.embeddings(["The river", "A"]), vector, rtol=1e-4, atol=1e-5)
    assert_close(llm(IDS), logits, rtol=1e-4, atol=5e-5)
    assert llm.config.n_head == config.n_head  # that of the whole
    with pytest.raises(InputError, match=r"a tensor_parallel model is not saved; copy .*ck"):
        llm.save(tmp_path / "copy")
    with pytest.raises(InputError, match=r"another model of this process is tensor_parallel"):
        LLM.load(tmp_path / "ck", distribute=None).distribute("cpu", 2, generate_strategy="tensor_parallel")
    multiprocessing.active_children()[0].kill()
    with pytest.raises(MachineError, match=r"process of another device is gone; load the model again"):
        said()
    llm.distribute("cpu", 2, generate_strategy="sequential")
    assert not multiprocessing.active_children()
    assert not torch.distributed.is_initialized()
    assert said() == one
    llm.distribute("cpu", 1)
    assert said() == one


def test_an_llm_that_cannot_be_cut_stays_where_it_is(tmp_path: Path) -> None:
    config = shrunk("Qwen2.5-0.5B", intermediate_size=49)
    llm = LLM.load(checkpoint.write(tmp_path / "ck", config, random_gpt(config)))
    with pytest.raises(InputError, match=r"2 devices: intermediate_size 49 is no multiple of 2"):
        llm.distribute("cpu", 2, generate_strategy="tensor_parallel")
    assert llm.generate(IDS[0], max_new_tokens=2, return_as_token_ids=True).shape == (2,)
    assert not multiprocessing.active_children()
