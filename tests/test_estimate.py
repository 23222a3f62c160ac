"""What `estimate` says beside what torch really builds, keeps and caches; and the memory it finds on a host."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from litgpt import estimate, loss
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.model import GPT, KVCache
from tests.makers.configs import NAMES, SHAPES, shrunk
from tests.test_config import DEEPSEEK

LATENT = [Config.from_hf({**DEEPSEEK, **entries}) for entries in ({}, {"q_lora_rank": None, "attention_bias": True})]


def on_meta(config: Config) -> GPT:
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("config", [*SHAPES, *LATENT], ids=lambda c: c if isinstance(c, str) else "latent")
def test_parameters_and_cache_are_exactly_the_models(config):
    config = shrunk(config)
    model = on_meta(config)
    assert estimate.parameters(config).total == sum(p.numel() for p in model.parameters())
    assert estimate.parameters(config).embedding == model.lm_head.weight.numel()
    with torch.device("meta"):
        cache = KVCache(config, 3, 20, dtype=torch.bfloat16)
    assert estimate.kv_cache_bytes(config, rows=3, length=20, dtype_bytes=2) == cache.nbytes


def test_every_registered_model_can_be_counted():
    billions = {name: estimate.parameters(Config.from_name(name)).total / 1e9 for name in NAMES}
    public = {
        "pythia-14m": 0.014,
        "Llama-2-7b-hf": 6.74,
        "Llama-3.2-1B": 1.24,
        "Mixtral-8x7B-v0.1": 46.7,
        "phi-2": 2.78,
    }
    assert {name: billions[name] for name in public} == pytest.approx(public, rel=0.01)
    assert estimate.parameters(Config.from_name("Qwen3-30B-A3B")).active / 1e9 == pytest.approx(3.3, rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_about_what_autograd_keeps(name):
    config = shrunk(name, n_embd=128, n_head=4, head_size=32, intermediate_size=352, rope_adjustments=None)
    model, ids = GPT(config), torch.randint(0, 96, (2, 64))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, targets=ids)
    claimed = estimate.training_memory(config, micro_batch_size=2, seq_len=64, precision="32-true").activations
    head = estimate._loss_bytes(config, 128, "cpu")
    assert 0.7 < (claimed - head) / (sum(kept.values()) - config.padded_vocab_size * config.n_embd * 4) < 1.5


def test_training_memory_follows_precision_optimizer_and_what_is_trained():
    config = Config.from_name("pythia-14m")
    count = estimate.parameters(config).total

    def memory(**changed):
        return estimate.training_memory(**{"config": config, "micro_batch_size": 1, "seq_len": 64, **changed})

    full, half = memory(precision="32-true"), memory(precision="bf16-true")
    assert (full.weights, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)
    assert (half.weights, half.gradients, half.optimizer) == (2 * count, 2 * count, 4 * count)
    assert memory(precision="bf16-mixed").weights == 4 * count
    assert memory(precision="32-true", optimizer_states=0, trainable=10).gradients == 40
    assert memory(precision="32-true", micro_batch_size=8).activations > full.activations
    assert full.total == full.weights + full.gradients + full.optimizer + full.activations


def test_autocast_keeps_no_copies_of_what_is_in_4_bits():
    sizes = {"config": Config.from_name("Llama-3-8B"), "micro_batch_size": 1, "seq_len": 64, "trainable": 1000}
    mixed = estimate.training_memory(**sizes, precision="bf16-mixed", quantize="bnb.nf4")
    true = estimate.training_memory(**sizes, precision="bf16-true", quantize="bnb.nf4")
    head_and_embedding = 2 * 128256 * 4096 * 2  # bytes in bf16
    assert mixed.activations - true.activations == pytest.approx(head_and_embedding, rel=0.02)


def test_a_part_of_a_model_takes_its_share_and_the_blocks_that_are_whole_for_a_while():
    config = Config.from_name("Llama-3-8B")
    sizes = {"config": config, "micro_batch_size": 1, "seq_len": 64, "precision": "bf16-true"}
    whole, part = estimate.training_memory(**sizes), estimate.training_memory(**sizes, parts=8)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(part, name) == getattr(whole, name) // 8
    assert whole.total / 8 < part.total < whole.total / 3


def test_the_logits_of_the_loss_are_counted_as_the_loss_holds_them():
    config = Config.from_name("pythia-14m")
    many = {"config": config, "micro_batch_size": 64, "seq_len": 512, "precision": "32-true"}
    here, there = (estimate.training_memory(**many, accelerator=kind).activations for kind in ("cpu", "cuda"))
    assert there - here == 3 * 4 * (loss.DEVICE_LOGITS - loss.CPU_LOGITS)


def test_inference_memory_counts_weights_and_cache():
    config = Config.from_name("pythia-14m")
    memory = estimate.inference_memory(config, dtype_bytes=2, rows=4, length=100)
    assert memory.weights == 2 * estimate.parameters(config).total
    assert memory.cache == estimate.kv_cache_bytes(config, 4, 100, 2)


def test_flops_are_two_per_weight_and_grow_with_the_context_up_to_the_window():
    config = Config.from_name("pythia-14m")
    weights = estimate.parameters(config)
    attention = estimate.flops_per_token(config, 1000) - estimate.flops_per_token(config, 0)
    assert estimate.flops_per_token(config, 0) == 2 * (weights.total - weights.embedding)
    assert attention == 2 * config.n_layer * config.n_embd * 1000
    sliding = Config.from_name("Mistral-7B-v0.1")
    assert estimate.flops_per_token(sliding, 8192) == estimate.flops_per_token(sliding, 4096)


# --- what there is ---------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path):
    """A made /proc and /sys/fs/cgroup; 8000 kB are available."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return estimate.available_memory(tmp_path / "proc", tmp_path / "cgroup")

    return write


def test_a_host_without_limits_has_what_it_says(host):
    assert host({}) == 8000 * 1024
    assert host({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}) == 8192000


@pytest.mark.parametrize("inner", ["cgroup/a/b", "cgroup/a", "cgroup"])
def test_the_limit_of_any_enclosing_cgroup_holds(host, inner):
    files = {"memory.max": "3000000\n", "memory.current": "2000000\n", "memory.stat": "anon 1\ninactive_file 500000\n"}
    entries = {f"{inner}/{name}": text for name, text in files.items()}
    assert host({"proc/self/cgroup": "0::/a/b\n", **entries}) == 1_500_000


def test_the_first_version_of_cgroups_is_read_too(host):
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
        "cgroup/memory/job/memory.limit_in_bytes": "4000000\n",
        "cgroup/memory/job/memory.usage_in_bytes": "3500000\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cgroup/memory/memory.usage_in_bytes": "3500000\n",
    }
    assert host(files) == 500_000


def test_the_limit_on_the_address_space_counts():
    command = "from litgpt.estimate import available_memory; print(available_memory())"

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, preexec_fn=limited)
    assert 0 < int(done.stdout) < 2**30, done.stderr


def test_this_host_has_memory():
    assert estimate.available_memory() > 2**20


def test_what_does_not_fit_is_refused_with_both_figures():
    estimate.require_fit(5, 5, "x", "y")
    with pytest.raises(InputError, match=r"^training x needs about 2\.5 GB of memory, 640 MB is free; lower y$"):
        estimate.require_fit(2_500_000_000, 640_000_000, "training x", "lower y")


@pytest.mark.parametrize(("n", "words"), [(0, "0.0 kB"), (1500, "1.5 kB"), (999_999, "1,000 kB"), (10**13, "10 TB")])
def test_bytes_in_words(n, words):
    assert estimate.in_words(n) == words


def test_estimating_needs_no_torch():
    command = "import sys, litgpt.estimate; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
