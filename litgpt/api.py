"""`LLM`: one object for notebooks and programs. Loads, generates, scores, embeds, saves, and trains as a torch module.

Importing it costs what torch costs; the rest is imported when it is first needed.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.errors import InputError, MissingError, require_choice, require_type, shown
from litgpt.place import Place, dtype_named, mode_named, number_of, require_strategy

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.data.base import DataModule
    from litgpt.generate.answers import Row, Stream
    from litgpt.generate.engine import Engine
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import Source
    from litgpt.model import GPT
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

Prompt: TypeAlias = str | Tensor  # text, or ids (T,)
Scored: TypeAlias = str | tuple[str, str]  # text, or (prompt, what follows)

WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
METHODS = ("lora", "full", "adapter", "adapter_v2")
HEAD = "lm_head.weight"
# what a directory's model is described by: written anew by `save`
MODEL_FILES = (".safetensors", ".bin", ".pth", ".index.json")
DESCRIPTIONS = ("config.json", "model_config.yaml", "hyperparameters.yaml", "prompt_style.yaml", "litgpt_manifest.json")


class Preprocessor:
    """Text to ids on the model's device, and back."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self.tokenizer = tokenizer
        self.device = device

    def encode(self, text: str) -> Tensor:
        """The ids (T,) of `text`."""
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64, device=self.device)

    def decode(self, token_ids: Tensor) -> str:
        return self.tokenizer.decode(token_ids.tolist())


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        ids: the tokens that were scored.
        logprobs: the natural logarithm of each one's probability, given all that stands before it.
        is_greedy: whether each of them is the likeliest token at its place.
    """

    ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole."""
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / max(len(self.ids), 1))


class LLM(torch.nn.Module):
    """A model with its tokenizer and prompt style; made by `LLM.load`.

    As a module it is trained like any other: `llm(ids, labels)` gives logits and loss, and what is generated afterwards
    comes from the weights as they are then. Several threads may generate at once, and several streams be read by turns,
    as long as nobody changes the weights meanwhile.

    Attributes:
        model: the `GPT`; None until it is placed (`distribute=None`).
        config: what the model is.
        tokenizer: None for a model without one; then prompts are ids.
        prompt_style: how prompts are dressed up.
        checkpoint_dir: the directory it was loaded from; None for a random model.
    """

    model: GPT | None

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Tokenizer | None = None,
        prompt_style: PromptStyle | None = None,
        checkpoint_dir: Path | None = None,
    ) -> None:
        super().__init__()
        from litgpt.generate.answers import Decoding

        self._describe(config, tokenizer, prompt_style, checkpoint_dir)
        self.model = None
        self.place = Place(torch.device("cpu"))
        self._helpers = ExitStack()  # the processes of other devices, while the model is cut
        weakref.finalize(self, self._helpers.close)
        self._saved: set[Path] = set()
        self._decoding = Decoding()
        self.register_load_state_dict_pre_hook(_add_model_to_names)

    def _describe(
        self, config: Config, tokenizer: Tokenizer | None, style: PromptStyle | None, directory: Path | None
    ) -> None:
        """Take note of what the model is; its weights are another matter."""
        from litgpt import families, prompts

        self.config = config
        self.tokenizer = tokenizer
        self.checkpoint_dir = directory
        # a style that the tokenizer's files do not bring with them: `save` writes it
        self._own_style = style or (None if directory is None else prompts.load(directory))
        self.prompt_style = self._own_style or prompts.DEFAULT
        if tokenizer is not None and self._own_style is None:
            self.prompt_style = prompts.choose(tokenizer.dir, tokenizer, families.prompt_for(config.name))

    # -- loading and placing

    @classmethod
    def load(
        cls,
        model: str | Path | Config,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: str | Path | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
        *,
        quantize: str | None = None,
        precision: str | None = None,
        device: str | torch.device | None = None,
        prompt_style: str | Path | PromptStyle | None = None,
        compile: bool = False,
        prepack: bool = False,
    ) -> LLM:
        """A model to use or to train.

        Args:
            model: a checkpoint directory, its name below `checkpoints/`, or a repository of the Hugging Face Hub, which
                is downloaded first. For a random one the name of a model (`litgpt download list` shows all), a
                directory, or a `Config`.
            init: "pretrained": with the weights of the checkpoint. "random": with fresh ones, drawn from torch's
                own generator (`torch.manual_seed`).
            tokenizer_dir: where the tokenizer is, if not in the checkpoint. A random model needs one for text only.
            access_token: for a repository of the Hub that asks for one.
            distribute: "auto": onto the best device there is. None: wait for `distribute` or `trainer_setup`.
            quantize: weights in 4 or 8 bits, such as "bnb.nf4".
            precision: 32-true, bf16-true or 16-true; None: as the files are (random: 32-true).
            device: such as "cpu" or "cuda:1", instead of the best one.
            prompt_style: a style, its name or a Jinja file, instead of the checkpoint's own.
            compile: compile decoding, when the first text is generated, and again after the weights have changed.
            prepack: in bf16 on a CPU, lay the weights out for its products: 1.3 to 1.5 times as fast, for as much
                memory again as the weights take, and half a second for a GB. Training lets go of it.

        Raises:
            UserError: what is missing, unknown, broken or too large.
        """
        from litgpt.generate.session import Source
        from litgpt.launch import device_named
        from litgpt.tokenizer import Tokenizer

        require_choice("init", init, ("pretrained", "random"))
        require_choice("distribute", distribute, ("auto", None))
        _require_style(prompt_style)
        place = Place(
            device_named(device or "auto"),
            dtype_named(precision),
            mode_named(quantize),
            compile=compile,
            prepack=prepack,
        )
        directory: Path | None = None
        if init == "random":
            config, tokenizer = _described(model)
        else:
            source = Source.find(_path(model), access_token=access_token)
            directory, config, tokenizer = source.place, source.checkpoint.config, _tokenizer(source)
        if tokenizer_dir is not None:
            require_type(tokenizer_dir, (str, os.PathLike), "tokenizer_dir", "a directory, or None")
            tokenizer = Tokenizer(tokenizer_dir)
        if prompt_style is not None and tokenizer is None:
            raise InputError(f"prompt_style {shown(str(prompt_style))} needs a tokenizer; give tokenizer_dir")
        style = _style(prompt_style, tokenizer)
        llm = cls(config, tokenizer=tokenizer, prompt_style=style, checkpoint_dir=directory)
        llm.place = place
        if distribute is not None:
            llm._place(place)
        return llm

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | Literal["auto"] = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Place the model; one that is loaded already is moved, with the weights that it has now.

        Args:
            accelerator: "cpu", "cuda", "mps" or "auto".
            devices: how many; "auto": all GPUs with a `generate_strategy`, else one device.
            precision: 32-true, bf16-true or 16-true; None: as it is.
            quantize: weights in 4 or 8 bits, such as "bnb.nf4".
            generate_strategy: how several devices share the model. "sequential": each holds some of the layers.
                "tensor_parallel": each holds a part of every layer, in a process of its own, and all compute at
                the same time; such a model answers, but is neither trained nor saved.
            fixed_kv_cache_size: prompt and answer together have at most so many tokens; None or
                "max_model_supported": as many as the model's context.
        """
        from litgpt.launch import device_named

        require_strategy(devices, generate_strategy)
        longest = None if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        is_whole = isinstance(longest, int) and not isinstance(longest, bool)
        if longest is not None and not (is_whole and 1 <= longest <= self.config.block_size):
            raise InputError(
                f"fixed_kv_cache_size is {shown(longest)}; it must lie between 1 and the model's context, "
                f"{self.config.block_size}, or be max_model_supported"
            )
        place = Place(
            device_named(accelerator),
            dtype_named(precision) or self.place.dtype,
            mode_named(quantize),
            longest,
            self.place.compile,
            self.place.prepack,
        )
        if generate_strategy is not None:
            n = number_of(place.device, devices)
            # a model on several devices is not compiled
            place = replace(
                place, strategy=generate_strategy if n > 1 else None, devices=n, compile=place.compile and n == 1
            )
            if place.is_cut:
                from litgpt.placement.tensor_parallel import part_of

                part_of(self.config, n)  # refused while the model is still where it was
        self._place(place)

    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """Get ready for a Lightning Trainer: on the CPU (the Trainer moves it), in fp32 unless a precision was given.

        Args:
            trainer_ckpt: a `.ckpt` file that the Trainer wrote, whose weights to take up.
        """
        if self.place.quantize is not None:
            raise InputError(f"a model in {self.place.quantize} is not trained as a whole; load it without quantize")
        self._place(Place(torch.device("cpu"), self.place.dtype or torch.float32))
        if trainer_ckpt is not None:
            self._take_weights(Path(trainer_ckpt))
        self.train()

    def _take_weights(self, path: Path) -> None:
        """The weights in a Trainer's checkpoint, whatever the modules around the model are called there."""
        from litgpt import weights

        if not path.is_file():
            what = "is a directory, a sharded checkpoint" if path.is_dir() else "does not exist"
            raise MissingError(f"trainer_ckpt {path} {what}; give the .ckpt file of a Lightning Trainer")
        file = weights.open_file(path)
        before = next((name.removesuffix(HEAD) for name in file.entries if name.endswith(HEAD)), None)
        if before is None:
            raise InputError(f"trainer_ckpt {path} holds no {HEAD}: it is not the checkpoint of a model like this one")
        tensors = {name.removeprefix(before): file.fetch(name) for name in file.entries if name.startswith(before)}
        try:
            self._placed.load_state_dict(tensors)
        except RuntimeError as error:  # torch lists names and shapes that differ
            raise InputError(f"trainer_ckpt {path} is of another model than {self.config.name}: {error}") from None

    def _place(self, place: Place) -> None:
        """Load, draw or move the model."""
        if (
            self.model is not None
            and place.quantize == self.place.quantize
            and not (place.strategy or self.place.strategy)
        ):
            place.take(self.model)
        elif self.checkpoint_dir is None:
            if wanted := place.quantize or place.strategy:
                raise InputError(f"{wanted} is for a model in files; save this one, load it again")
            self.model = place.draw(self.config)
        else:
            if self.model is not None and not self._is_as_in_files():
                raise InputError(
                    f"the weights are not those of {self.checkpoint_dir} any more; save the model, then load it with "
                    f"{place.quantize or place.strategy}"
                )
            self._let_go()  # the old one goes before the new one comes
            try:
                self.model = place.read(self.checkpoint_dir, self._helpers)
            except BaseException:
                self._helpers.__exit__(*sys.exc_info())
                raise
            # a merged head is not tied any more; of a model that is cut, `config` is that of a part
            self.config = getattr(self.model, "whole", self.model.config)
        self.place = place
        self._decoding.forget()
        self.eval()
        place.finish(self._placed)

    def _let_go(self) -> None:
        """Part with the model, and with the processes that have parts of it."""
        self.model = None
        self._decoding.forget()
        self._helpers.close()

    def _is_as_in_files(self) -> bool:
        """Whether the model is still what `checkpoint_dir` holds: compared, number by number."""
        from litgpt import adapters, checkpoint

        if self.checkpoint_dir is None or adapters.find(self.checkpoint_dir) is not None:
            return False
        if self.place.quantize is not None or self.place.is_cut:
            return True  # such a model does not train
        state = self._placed.state_dict()
        dtype = self._placed.wte.weight.dtype
        tensors = checkpoint.open_(self.checkpoint_dir).tensors(dtype)
        return all(torch.equal(state[name].cpu(), tensor) for name, tensor in tensors)

    @property
    def _placed(self) -> GPT:
        if self.model is None:
            raise InputError("the model is not placed yet; call llm.distribute() or llm.trainer_setup() first")
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the model is, or is to be."""
        return self.place.device if self.model is None else self.model.wte.weight.device

    @property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor(self._require_tokenizer(), self.device)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; give tokenizer_dir to LLM.load, or work with token ids")
        return self.tokenizer

    # -- as a module

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with targets logits and loss.

        Args:
            input_ids: (B, T) token ids.
            target_ids: (B, T) labels that lie like `input_ids` (often the same tensor): place t is learnt from the
                places before it. -100 is not counted.
            loss_fn: of logits (B, T - 1, V) and labels (B, T - 1); None: mean cross entropy over the counted labels.

        Returns:
            Logits (B, T, padded_vocab_size), and the loss.
        """
        model = self._placed
        _require_ids(input_ids, "input_ids")
        if target_ids is not None and loss_fn is None:
            _require_ids(target_ids, "target_ids", (torch.int64,))
            if target_ids.shape != input_ids.shape:
                shapes = f"{tuple(target_ids.shape)}, input_ids {tuple(input_ids.shape)}"
                raise InputError(f"target_ids has the shape {shapes}; labels lie like the ids")
        if torch.is_grad_enabled():  # the weights are about to change
            self._decoding.forget()
        n_tokens = self._n_tokens
        with _naming(input_ids, "input_ids", n_tokens):
            logits: Tensor = model(input_ids)
        if target_ids is None:
            return logits
        if loss_fn is not None:
            return logits, loss_fn(logits[..., :-1, :], target_ids[..., 1:])
        with _naming(target_ids, "target_ids", n_tokens, -100):
            return logits, mean_cross_entropy(logits[..., :-1, :], target_ids[..., 1:])

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The model's tensors under its own names, without a `model.` before them."""
        return self._placed.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def train(self, mode: bool = True) -> LLM:
        """As `torch.nn.Module.train`; what was computed for coming answers is forgotten."""
        if mode:
            self._decoding.forget()
        super().train(mode)
        return self

    # -- generating

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        n: int = 1,
        batch_size: int = 8,
    ) -> Any:
        """Text that answers or continues a prompt.

        Args:
            prompt: a text, token ids (T,), or a list of these; the prompts of a list are worked on together.
            sys_prompt: an instruction that comes before the prompt, for models that were trained with one. Not for
                token ids, which are taken as they are.
            max_new_tokens: the longest answer.
            temperature: flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the likeliest tokens that together reach this probability only.
            return_as_token_ids: answers as tensors of ids instead of texts.
            stream: a `Stream` of pieces instead of the whole.
            min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias: as `Sampling` has them.
            stop: texts at which an answer ends; they are not part of it.
            seed: makes answers repeatable: that of each prompt is what it is alone; sample i uses seed + i.
            n: answers for each prompt, which is read once for all of them.
            batch_size: answers that are worked on together; further ones wait.

        Returns:
            A text; with `n` > 1 a list of them; for a list of prompts a list of what each of them gives.
        """
        from litgpt.generate.answers import Stream
        from litgpt.generate.sampling import Sampling

        _require_at_least(1, n=n, batch_size=batch_size)
        require_type(max_new_tokens, int, "max_new_tokens", "a whole number")
        if seed is not None:
            require_type(seed, int, "seed", "a whole number, or None")
        if sys_prompt is not None:
            require_type(sys_prompt, str, "sys_prompt", "text, or None")
        if logit_bias is not None:
            require_type(logit_bias, Mapping, "logit_bias", "a mapping of token ids to numbers, or None")
        require_type(stop, (str, list, tuple), "stop", "text or a list of texts")
        stops = [stop] if isinstance(stop, str) else list(stop)
        for number, text in enumerate(stops):
            require_type(text, str, f"stop[{number}]", "text")
        samplings = [
            Sampling(
                temperature,
                top_k,
                top_p,
                None if seed is None else seed + sample,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias or {},
            )
            for sample in range(n)
        ]
        many = isinstance(prompt, (list, tuple))
        prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        names = [f"prompt[{number}]" for number in range(len(prompts))] if many else ["prompt"]
        ids = [self._ids(one, sys_prompt, name) for one, name in zip(prompts, names, strict=True)]
        if stops or not return_as_token_ids:
            self._require_tokenizer()
        with self._decoding.lock:
            engine = self._engine(min(batch_size, max(len(ids) * n, 1)) if self.place.compile else batch_size)
            answers = Stream(self._decoding, engine, n, many, return_as_token_ids)
            for one, name in zip(ids, names, strict=True):
                answers.rows += self._submit(engine, one, samplings, max_new_tokens, stops, name if many else "")
        return answers if stream else answers.whole()

    def chat(self, messages: Sequence[Mapping[str, Any]], *, sys_prompt: str | None = None, **options: Any) -> Any:
        """The next answer in a conversation.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]` with the roles system, user and assistant. Nothing is
                remembered: add the answer and the next message to the list yourself. What the model has read of
                the conversation is not read again.
            sys_prompt: an instruction that comes first, for a conversation without a system message.
            options: those of `generate`, from `max_new_tokens` on.
        """
        require_type(messages, (list, tuple), "messages", 'a list of {"role": ..., "content": ...}')
        for number, message in enumerate(messages):
            require_type(message, Mapping, f"messages[{number}]", 'a mapping {"role": ..., "content": ...}')
        if sys_prompt is not None:
            require_type(sys_prompt, str, "sys_prompt", "text, or None")
        if sys_prompt and any(message.get("role") == "system" for message in messages):
            raise InputError("sys_prompt is given, and messages has a system message; give one of them")
        from litgpt.prompts.messages import with_system

        return self.generate(torch.tensor(self._encoded(with_system(messages, sys_prompt))), **options)

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[Any, dict[str, list[float]]]:
        """Generates `num_iterations` times, from the first token of the prompt on, and takes the time.

        Returns:
            What `generate(**kwargs)` gives (the last time), and for each measure one figure per iteration.
        """
        from litgpt.launch import peak_memory

        _require_at_least(1, num_iterations=num_iterations)
        options = {**kwargs, "stream": True}
        memory = "Total GPU memory allocated in GB" if self.device.type == "cuda" else "Peak memory in GB"
        measures: dict[str, list[float]] = {}
        for _ in range(num_iterations):
            self._decoding.forget()  # nothing of the prompt is known yet
            started = time.perf_counter()
            answers: Stream = self.generate(**options)
            first = next((time.perf_counter() for _ in answers if answers.n_tokens), time.perf_counter())
            whole = answers.whole()
            seconds = time.perf_counter() - started
            figures = {
                "Seconds total": seconds,
                "Seconds to first token": first - started,
                "Tokens generated": answers.n_tokens,
                "Inference speed in tokens/sec": answers.n_tokens / seconds,
                memory: peak_memory(self.device) / 1e9,
            }
            for name, figure in figures.items():
                measures.setdefault(name, []).append(figure)
        return whole, measures

    def _ids(self, prompt: Any, sys_prompt: str | None, name: str) -> list[int]:
        if isinstance(prompt, Tensor):
            if prompt.dim() != 1 or prompt.dtype not in WHOLE:
                what = f"{name} is a tensor {tuple(prompt.shape)} of {prompt.dtype}"
                raise InputError(f"{what}, must be token ids (T,), which are whole numbers")
            if sys_prompt:
                raise InputError(f"sys_prompt is given, but {name} is token ids; give text, or ids that begin with it")
            return prompt.tolist()
        from litgpt.generate.session import conversation

        require_type(prompt, str, name, "text or a tensor of token ids")
        return self._encoded(conversation(prompt, sys_prompt))

    def _encoded(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.prompt_style.encode(self._require_tokenizer(), messages) or [self._first_token]

    @property
    def _n_tokens(self) -> int:
        """Rows for tokens: ids lie below."""
        return self.config.padded_vocab_size or self.config.vocab_size

    @property
    def _first_token(self) -> int:
        """What stands before a text of which nothing stands."""
        tokenizer = self._require_tokenizer()
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise InputError("the text is empty, and the tokenizer has no token to begin with; give some text")
        return first

    def _submit(
        self, engine: Engine, ids: list[int], samplings: list[Sampling], most: int, stops: list[str], name: str
    ) -> list[Row]:
        from litgpt.generate.answers import Row
        from litgpt.generate.stops import StopAutomaton

        tokenizer = self.tokenizer
        ends = [] if tokenizer is None else self.prompt_style.stop_tokens(tokenizer)
        try:
            requests = engine.submit_samples(ids, samplings, max_new_tokens=most, stop=ends)
        except InputError as error:
            raise InputError(f"{name}: {error}" if name else str(error)) from None
        return [
            Row(r, None if tokenizer is None else tokenizer.stream(ids), StopAutomaton[str](stops)) for r in requests
        ]

    def _engine(self, max_rows: int) -> Engine:
        """Called under the lock."""
        n_tokens = None if self.tokenizer is None else self.tokenizer.vocab_size
        place = self.place
        settings = {"max_len": place.max_len, "n_tokens": n_tokens, "compile": place.compile}
        if place.compile and place.max_len is not None:
            settings["least"] = place.max_len  # a cache that grows is compiled for again
        return self._decoding.engine(self._placed, max_rows, **settings)

    # -- what the model makes of a text

    def score(self, text: Scored | Sequence[Scored]) -> Any:
        """How likely the model finds a text, or what follows a prompt. No prompt style is applied.

        Args:
            text: a text, a pair (prompt, continuation) of texts, or a list of these.

        Returns:
            A `Score`, or a list of them.
        """
        many = isinstance(text, list)
        texts: list[Any] = text if isinstance(text, list) else [text]
        from litgpt.generate.answers import evaluating
        from litgpt.generate.engine import Engine

        pairs = [self._pair(one, f"text[{i}]" if many else "text") for i, one in enumerate(texts)]
        # over all rows of the head, those too that no token has: as the loss counts, and other programs do
        engine = Engine(self._placed)
        with self._decoding.lock, evaluating(engine.model):
            found = list(engine.score(pairs, top=1))
        scores = [
            Score([s.token for s in row], [s.logprob for s in row], all(s.top[0][0] == s.token for s in row))
            for row in found
        ]
        return scores if many else scores[0]

    def _pair(self, text: Any, name: str) -> tuple[list[int], list[int]]:
        """The ids before those to be scored, and those. A prompt and what follows are tokenised as one text."""
        tokenizer = self._require_tokenizer()
        prompt, rest = text if isinstance(text, tuple) and len(text) == 2 else ("", text)
        for part in (prompt, rest):
            require_type(part, str, name, "text, or a pair (prompt, continuation)")
        before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + rest)
        n_before = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        pair = (whole[:n_before], whole[n_before:]) if n_before else ([self._first_token], whole)
        count, limit = len(pair[0]) + len(pair[1]), self.config.block_size
        if count > limit + 1:  # the last one is scored, not read
            raise InputError(f"{name} has {count} tokens, more than the model's context of {limit}; shorten it")
        return pair

    def evaluate(
        self,
        tasks: str | Sequence[str] | None = None,
        *,
        text: str | None = None,
        stride: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str = 1,
        limit: float | None = None,
        seed: int = 1234,
        include_path: str | Path | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = True,
        log_samples: bool = False,
        confirm_run_unsafe_code: bool = False,
    ) -> dict[str, Any]:
        """Score the model as it is now, on lm-eval's tasks or on how well it foretells a text.

        Args:
            tasks: names as in `litgpt evaluate`, in one text or a list.
            text: instead of tasks, a text (not a file).

        The other arguments are those of `litgpt evaluate`.

        Returns:
            lm-eval's results, with "results" for each task; of a text its "perplexity", "bits_per_byte" and others.
        """
        from litgpt.eval.candidate import Candidate, rows_of
        from litgpt.eval.harness import Asked, load, names_in, run
        from litgpt.eval.perplexity import foretell
        from litgpt.generate.answers import evaluating

        path = None if include_path is None else Path(include_path)
        chat = (apply_chat_template, fewshot_as_multiturn)
        asked = Asked(names_in(tasks), num_fewshot, limit, path, *chat, log_samples, seed, confirm_run_unsafe_code)
        rows, model, tokenizer = rows_of(batch_size), self._placed, self._require_tokenizer()
        if text is None:
            asked.check()
        elif asked.tasks:
            raise InputError("both tasks and text are given; evaluate one after the other")
        loaded = load(asked) if text is None else None
        with self._decoding.lock, evaluating(model):
            candidate = Candidate(model, tokenizer, self.prompt_style, rows)
            if loaded is None:
                return foretell(candidate, text or "", stride).figures()
            return run(candidate, loaded, asked)

    def embeddings(
        self,
        texts: str | Sequence[str],
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        batch_size: int = 8,
    ) -> Tensor:
        """One vector for each text, from what the model's head reads. No prompt style is applied.

        Args:
            texts: a text or a list of them.
            pooling: the mean over all tokens, or the last one's, which has seen all the others.
            normalize: to length 1, so that a product is a cosine.
            batch_size: texts that are worked on together.

        Returns:
            (n_embd,) for a text, (N, n_embd) for a list; fp32, on the CPU.
        """
        require_choice("pooling", pooling, ("mean", "last"))
        _require_at_least(1, batch_size=batch_size)
        many = isinstance(texts, (list, tuple))
        rows = [
            self._tokens(text, f"texts[{i}]" if many else "texts") for i, text in enumerate(texts if many else [texts])
        ]
        vectors = torch.empty(len(rows), self.config.n_embd)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        from litgpt.generate.answers import evaluating
        from litgpt.generate.embedding import embed

        with self._decoding.lock, evaluating(self._placed):
            for start in range(0, len(rows), batch_size):
                batch = by_length[start : start + batch_size]
                vectors[batch] = embed(self._placed, [rows[i] for i in batch], pooling, normalize)
        return vectors if many else vectors[0]

    def _tokens(self, text: Any, name: str) -> list[int]:
        require_type(text, str, name, "text")
        ids = self._require_tokenizer().encode(text) or [self._first_token]
        if len(ids) > self.config.block_size:
            limit = self.config.block_size
            raise InputError(f"{name} has {len(ids)} tokens, more than the model's context of {limit}; shorten it")
        return ids

    # -- training by the commands

    def finetune(
        self,
        data: DataModule | str | Path | Sequence[Mapping[str, Any]],
        method: Literal["lora", "full", "adapter", "adapter_v2"] = "lora",
        out_dir: str | Path | None = None,
        **options: Any,
    ) -> Path:
        """Finetune as `litgpt finetune_<method>` does; afterwards this object is the finetuned model.

        Args:
            data: a data module, the path of a file (JSON, JSONL, CSV, Parquet), or a list of records.
            method: what trains.
            out_dir: where checkpoints, metrics and the result go; None: out/finetune/<method>. Weights that lie in no
                directory, since they are random or were trained here, are saved first, to `<out_dir>-base`.
            options: those of the command, such as `lora_r=16`, `train={"max_steps": 100}` or `train=TrainArgs(...)`.

        Returns:
            The directory of the result, `out_dir/final`.
        """
        require_choice("method", method, METHODS)
        from litgpt import parser
        from litgpt.data.rows_at_hand import data_module

        setup = importlib.import_module(f"litgpt.finetune.{method}").setup
        out_dir = Path(out_dir or f"out/finetune/{method}").resolve()
        source = self._source(out_dir)
        if out_dir in source.resolve().parents:
            raise InputError(f"out_dir {out_dir} holds the model that is finetuned ({source}); give another one")
        if self.place.quantize is not None:
            options = {"quantize": self.place.quantize, **options}
        arguments = parser.from_python(setup, "llm.finetune", {"checkpoint_dir": source, "out_dir": out_dir, **options})
        self._describe_from(source)
        self._let_go()  # the training has a model of its own; this one is in files
        try:
            setup(**{**arguments, "data": data_module(data)})
            self._describe_from(out_dir / "final")
        finally:
            self._place(self.place)
        return out_dir / "final"

    def _source(self, out_dir: Path) -> Path:
        """A directory that holds the weights as they are now."""
        if self.checkpoint_dir is not None and (self.model is None or self._is_as_in_files()):
            return self.checkpoint_dir
        return self.save(out_dir.with_name(f"{out_dir.name}-base"))

    def _describe_from(self, directory: Path) -> None:
        from litgpt.generate.session import Source

        source = Source.find(directory)
        self._describe(source.checkpoint.config, _tokenizer(source), None, source.place)

    # -- saving

    def save(
        self,
        out_dir: str | Path | None = None,
        prompt_style: str | Path | PromptStyle | None = None,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Write a Hugging Face directory, whole or not at all: for `LLM.load`, every command and `transformers`.

        Args:
            out_dir: where; the directory that this model was loaded from or saved to is replaced, any other that is not
                empty is refused.
            prompt_style: a style to keep with the model, its name or a Jinja file, instead of its own.
            overwrite: replace whatever `out_dir` holds.
        """
        from litgpt import adapters, checkpoint

        if out_dir is None:
            raise InputError("out_dir is missing; give the directory to write")
        require_type(out_dir, (str, os.PathLike), "out_dir", "the directory to write")
        if self.place.quantize is not None:
            raise InputError(f"a model in {self.place.quantize} is not saved; load it without quantize, then save it")
        if self.place.is_cut:
            raise InputError(f"a tensor_parallel model is not saved; copy {self.checkpoint_dir}, whose weights it has")
        target = Path(out_dir).resolve()
        is_own = target in self._saved or (self.checkpoint_dir is not None and target == self.checkpoint_dir.resolve())
        adapter = None if self.checkpoint_dir is None else adapters.find(self.checkpoint_dir)
        if adapter is not None and adapter.method != "lora":
            raise InputError(f"a model with {adapter.method} is no whole model; copy {adapter.home} instead")
        style = _style(prompt_style, self.tokenizer) or self._own_style
        checkpoint.write(
            target,
            self.config,
            self._placed,
            tokenizer_dir=None if self.tokenizer is None else self.tokenizer.dir,
            prompt_style=style,
            extra=partial(_keep_others, target) if is_own else None,
            overwrite=overwrite or is_own,
        )
        self._saved.add(target)
        return target


# What `load` and `save` are made of -----------------------------------------------------------------------------------


def _path(model: Any) -> str | Path:
    require_type(model, (str, Path), "model", "a checkpoint directory or a model's name")
    return model


def _require_style(style: Any) -> None:
    if style is not None and not isinstance(style, (str, Path)):
        from litgpt.prompts import PromptStyle

        require_type(style, PromptStyle, "prompt_style", "a style, its name or a Jinja file, or None")


def _style(style: Any, tokenizer: Tokenizer | None) -> PromptStyle | None:
    """A style, its name or a Jinja file: the style; None where there is none."""
    _require_style(style)
    if not isinstance(style, (str, Path)):
        return style
    from litgpt import prompts

    if Path(style).suffix != ".jinja":
        return prompts.from_name(str(style))
    if tokenizer is None:
        raise InputError(f"prompt_style {style} needs a tokenizer; give tokenizer_dir to LLM.load")
    return prompts.from_file(Path(style), tokenizer)


def _described(model: Any) -> tuple[Config, Tokenizer | None]:
    """What a random model is to be: a `Config`, one of the registered names, or as a directory says."""
    from litgpt.checkpoint import find
    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

    if isinstance(model, Config):
        return model, None
    try:
        place = find(_path(model))
    except MissingError:
        return Config.from_name(str(model)), None
    try:
        return Config.from_checkpoint(place), Tokenizer(place)
    except MissingError:
        return Config.from_checkpoint(place), None


def _tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has none: whoever needs one will be told."""
    try:
        return source.tokenizer()
    except MissingError:
        return None


def _require_at_least(least: int, **numbers: Any) -> None:
    for name, number in numbers.items():
        require_type(number, int, name, "a whole number")
        if number < least:
            raise InputError(f"{name} is {number}; it must be {least} or more")


def _require_ids(ids: Any, name: str, dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.int32)) -> None:
    """Of what torch takes as ids, rows of them: nothing is looked at that would make a GPU wait."""
    require_type(ids, Tensor, name, "a tensor (B, T) of token ids")
    if ids.dim() != 2 or ids.dtype not in dtypes:
        hint = f"; give {name}[None]" if ids.dim() == 1 and ids.dtype in dtypes else ""
        what = f"{name} is a tensor {tuple(ids.shape)} of {ids.dtype}"
        raise InputError(f"{what}, must be token ids (B, T) in int64{hint}")


def _require_known(ids: Sequence[int], name: str, n_tokens: int, *others: int) -> None:
    unknown = next((token for token in ids if not 0 <= token < n_tokens and token not in others), None)
    if unknown is not None:
        besides = "".join(f", and {other}" for other in others)
        raise InputError(f"{name} holds the token {unknown}; this model has the tokens 0 to {n_tokens - 1}{besides}")


@contextmanager
def _naming(ids: Tensor, name: str, n_tokens: int, *others: int) -> Iterator[None]:
    """Names the id that torch found to be out of range."""
    try:
        yield
    except IndexError:
        _require_known(ids.flatten().tolist(), name, n_tokens, *others)
        raise


def _add_model_to_names(llm: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The names that `LLM.state_dict` gives, as torch looks for them: below `model.`"""
    inner = f"{prefix}model."
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(inner)]:
        state_dict[inner + name.removeprefix(prefix)] = state_dict.pop(name)


def _keep_others(old: Path, new: Path) -> None:
    """What lies beside a model, such as its licence, stays when the model is saved over itself."""
    for file in old.iterdir():
        is_model = file.name.endswith(MODEL_FILES) or file.name in DESCRIPTIONS
        if file.is_file() and not is_model and not (new / file.name).exists():
            shutil.copyfile(file, new / file.name)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the targets (B, T) that are not -100, of logits (B, T, V); 0 where none is."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum", ignore_index=-100)
    return total / (targets != -100).sum().clamp(min=1)
