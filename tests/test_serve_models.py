"""Several devices, several adapters: whose answer a request gets, and that it is the right one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from litgpt.generate.sampling import Sampling
from litgpt.generate.session import conversation, load_session
from tests.makers.servers import Server, alive, make_served, serving

ASK = "The river ran past"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("served"))


def make_adapter(directory: Path, base: Path, seed: int) -> Path:
    """Random LoRA matrices, as PEFT writes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(directory)
    return directory


def asked(server: Server, model: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": ASK}],
        "max_tokens": 12,
        "temperature": 0,
        "repetition_penalty": 1.3,
    }
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return found["choices"][0]["message"]["content"]


def answer(directory: Path) -> str:
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    return "".join(load_session(directory).answer(conversation(ASK), sampling, max_new_tokens=12))


def test_replicas_answer_for_the_model_and_for_each_adapter_by_name(checkpoint: Path, tmp_path: Path) -> None:
    directories = {
        "one": make_adapter(tmp_path / "one", checkpoint, 1),
        "two": make_adapter(tmp_path / "two", checkpoint, 2),
    }
    options = [word for name, place in directories.items() for word in ("--adapters", f"{name}={place}")]
    with serving(checkpoint, "--devices", "2", "--model_name", "base", *options, said=tmp_path / "said.txt") as server:
        assert server.metrics()["litgpt_replicas_ready"] == 2
        models = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["base", "one", "two"]
        names = ["base", "one", "two"] * 4
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda name: asked(server, name), names))
        alone = {name: answer(place) for name, place in {"base": checkpoint, **directories}.items()}
        assert found == [alone[name] for name in names]
        assert len(set(alone.values())) == 3


@pytest.mark.parametrize("strategy", ["sequential", "tensor_parallel"])
def test_a_model_laid_over_devices_answers_the_same(checkpoint: Path, tmp_path: Path, strategy: str) -> None:
    options = ("--devices", "2", "--generate_strategy", strategy, "--model_name", "base")
    with serving(checkpoint, *options, said=tmp_path / "said.txt") as server:
        assert asked(server, "base") == answer(checkpoint)
        workers = server.workers()
        assert server.stop() == 0, server.said.read_text()
    assert not alive(workers)


@pytest.mark.parametrize("streams", [False, True])
def test_the_class_for_litserve_answers_the_same(checkpoint: Path, streams: bool) -> None:
    """As LitServe calls it, in its own order."""
    from litgpt.deploy.lit_api import LitGPTAPI, StreamingLitGPTAPI

    api = (StreamingLitGPTAPI if streams else LitGPTAPI)(checkpoint, temperature=0)
    api.setup("cpu")
    request = api.decode_request({"prompt": ASK, "max_new_tokens": 12, "repetition_penalty": 1.3})
    found = api.encode_response(api.predict(request))
    text = "".join(piece["output"] for piece in found) if streams else found["output"]
    assert text == answer(checkpoint)
    if not streams:
        assert api.predict([request, request]) == [text, text]
    with pytest.raises(Exception, match="prompt"):
        api.decode_request({"prompt": 3})
