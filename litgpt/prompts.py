"""How a conversation becomes the text and the ids that a model was trained on: chat templates and named styles.

A checkpoint's own Jinja template is a stranger's program: it runs in a sandbox that can neither call nor reach anything
but the conversation. What a user typed stays plain text, whatever it looks like. Knows no model and no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import InputError, near_miss
from litgpt.tokenizer import Encoded, Tokenizer

Message = Mapping[str, Any]
STYLE_FILE = "prompt_style.yaml"
TEMPLATE_FILE = "chat_template.jinja"
NAMESPACE = "litgpt.prompts."  # of the class names in LitGPT 0.5's prompt_style.yaml


class PromptStyle:
    """A way to write conversations. A subclass of your own needs `apply` alone.

    Messages are mappings with `role` (system, user, assistant) and `content`.
    """

    name = "custom"
    adds_bos = True  # whether the tokenizer's own rule for bos applies to the text

    @staticmethod
    def from_name(name: str) -> PromptStyle:
        """The style of this name in the table, or of the class name that LitGPT 0.5 had for it."""
        return from_name(name)

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        """The text of one prompt, or of a whole conversation, up to where the model goes on."""
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation.

        add_generation_prompt: whether it ends with what goes before the next answer.
        tools: JSON schemas of functions that the model may call, for templates that know tools.
        tokens: text of the tokenizer's special tokens (`Tokenizer.special_tokens`), for what ends an answer.
        """
        return self._write(_messages(messages), add_generation_prompt, _plain(tools), tokens or {}, NO_SPAN)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        sys_prompt: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        special: bool = False,
    ) -> list[int]:
        """The ids of a conversation: the style's own special tokens are special, those in the messages are text.

        special: whether they are special in the messages too; for messages from somebody who may steer the model.
        """
        messages = with_system(messages, sys_prompt)
        guard = Guard(tokenizer, special)
        return self._encode(tokenizer, messages, add_generation_prompt, tools, NO_SPAN, guard)[0]

    def encode_with_mask(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        sys_prompt: str | None = None,
        tools: Sequence[Message] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation and, for each, whether the assistant wrote it, its end of turn included."""
        messages = with_system(messages, sys_prompt)
        return self._encode(tokenizer, messages, False, tools, SPAN, Guard(tokenizer))

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Sequences of ids, each of which ends an answer."""
        return [[i] for i in tokenizer.eos_ids]

    def jinja(self, *, adds_bos: bool) -> str | None:
        """A chat template that writes the same text, None where there is none; `adds_bos`: it starts with bos."""
        return None

    def _encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Message] | None,
        span: tuple[str, str],
        guard: Guard,
    ) -> tuple[list[int], list[bool]]:
        guarded = [guard.message(message) for message in _messages(messages)]
        marked = self._write(guarded, add_generation_prompt, guard.value(_plain(tools)), tokenizer.special_tokens, span)
        parts, spans = read_marks(marked)
        encoded = tokenizer.encode_parts(parts)
        before = tokenizer.encode("") if self.adds_bos else []
        if encoded.ids[: len(before)] == before:
            before = []
        return before + encoded.ids, [False] * len(before) + _mask(encoded, spans)

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        """The text, with the two strings of `span` around what the assistant wrote."""
        system, turns = _take_system(messages)
        text = ""
        for message in turns:
            if message["role"] == "assistant":
                text += "".join((span[0], message["content"], tokens.get("eos_token", ""), span[1]))
            else:
                text, system = text + self.apply(message["content"], sys_prompt=system), None
        return text


# ------------------------------------------------------------------------------------------------- named styles


@dataclass(frozen=True)
class Style(PromptStyle):
    """A style by its pieces. `system` goes into the first user turn only:

        begin user(system) assistant answer after  between user assistant answer after ...

    In them `{system}`, `{prompt}`, `{input}`, `{answer}` stand for texts, `{bos}` and `{eos}` for tokens.
    """

    name: str = field()
    class_name: str = field()  # in LitGPT 0.5
    user: str = field()
    assistant: str = ""
    answer: str = "{answer}{eos}"
    after: str = ""
    system: str = "{system}"
    default_system: str = ""
    begin: str = ""
    between: str = ""
    user_with_input: str = ""
    default_system_with_input: str = ""
    strips: tuple[str, ...] = ()  # roles whose text loses the space around it in a conversation
    strips_system: bool = False  # the system text loses the space around it everywhere
    stop: tuple[tuple[str, ...], ...] = ()  # sequences of tokens that end an answer, beside eos

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        if not isinstance(prompt, str):
            return self.render(with_system(prompt, sys_prompt))
        return self.begin + self._first_user(prompt, sys_prompt, fields.get("input")) + self.assistant

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        named = [[i for token in sequence for i in _token_ids(tokenizer, token)] for sequence in self.stop]
        return super().stop_tokens(tokenizer) + [ids for ids in named if ids]

    def _first_user(self, prompt: str, system: str | None, extra: str | None) -> str:
        template, default = self.user, self.default_system
        if extra and self.user_with_input:
            template, default = self.user_with_input, self.default_system_with_input
        system = system or default
        system = system.strip() if self.strips_system else system
        block = fill(self.system, system=system) if system else ""
        return fill(template, system=block, prompt=prompt, input=extra or "")

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        ends = {"bos": tokens.get("bos_token", ""), "eos": tokens.get("eos_token", "")}
        system, turns = _take_system(messages, self.strips)
        text, first = self.begin, True
        for message in turns:
            content = message["content"]
            if message["role"] == "assistant":
                answer = fill(self.answer, answer=content, **ends)
                text += self.assistant + span[0] + answer + span[1] + self.after
            elif first:
                text, first = text + self._opening(content, system, message.get("input")), False
            else:
                text += fill(self.between + self.user, system="", prompt=content, **ends)
        return text + (self.assistant if add_generation_prompt else "")

    def _opening(self, prompt: str, system: str | None, extra: str | None) -> str:
        if system and "{system}" not in self.user:  # without a place of its own it goes before the first prompt
            prompt, system = f"{system}\n\n{prompt}", None
        return self._first_user(prompt, system, extra)

    def jinja(self, *, adds_bos: bool) -> str | None:
        """A chat template that writes the same text, for other programs."""
        content = "(message['content'] | trim)" if "user" in self.strips else "message['content']"
        system = (
            "(messages[0]['content'] | trim)"
            if "system" in self.strips or self.strips_system
            else "messages[0]['content']"
        )
        has_place = "{system}" in self.user
        lead = "" if has_place else "((system ~ '\\n\\n') if first.is_so and system else '') ~ "
        block = f"({_expression(self.system, system='system')}) if first.is_so and system else ''"
        pieces = {
            "bos": "bos_token" if adds_bos and not self.begin else "''",
            "begin": _expression(self.begin),
            "default": _literal(self.default_system if has_place else ""),
            "system": system,
            "block": block if has_place else "''",
            "between": f"('' if first.is_so else {_expression(self.between)})",
            "user": _expression(self.user, system="block", prompt=f"({lead}{content})"),
            "assistant": _expression(self.assistant),
            "answer": _expression(self.answer + self.after, answer=content),
        }
        return re.sub(r"@(\w+)@", lambda found: pieces[found[1]], JINJA)


JINJA = """\
{%- set first = namespace(is_so=true) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = @system@ or @default@ -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = @default@ -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- @bos@ -}}{{- @begin@ -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- set block = @block@ -%}
        {{- @between@ ~ @user@ -}}
        {%- set first.is_so = false -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- @assistant@ ~ @answer@ -}}
    {%- else -%}
        {{- raise_exception('this prompt style has no place for the role ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @assistant@ -}}{%- endif -%}
"""

PLACE = re.compile(r"\{(system|prompt|input|answer|bos|eos)\}")


def fill(template: str, **texts: str) -> str:
    """`template` with its `{places}` filled, all at once: what is filled in is not searched again."""
    return PLACE.sub(lambda found: texts[found[1]], template)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _expression(template: str, **names: str) -> str:
    """A Jinja expression for a filled template."""
    names = {"bos": "bos_token", "eos": "eos_token"} | names
    parts = PLACE.split(template)  # text, place, text, place, ..., text
    terms = [names[part] if i % 2 else _literal(part) for i, part in enumerate(parts) if i % 2 or part]
    return " ~ ".join(terms) or "''"


def _token_ids(tokenizer: Tokenizer, token: str) -> list[int]:
    return [tokenizer.token_to_id(token)] if tokenizer.has_token(token) else tokenizer.encode(token, bos=False)


TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
TASK_WITH_CONTEXT = TASK.format(", paired with an input that provides further context")
INSTRUCTION = "{system}### Instruction:\n{prompt}\n\n"
RESPONSE = "### Response:\n"
# The braces are doubled in the text itself: models were tuned on it so.
SEARCH_BING = (
    '{{"function": "search_bing", "description": "Search the web for content on Bing. This allows users to search '
    'online/the internet/the web for content.", "arguments": [{{"name": "query", "type": "string", "description": '
    '"The search query string"}}]}}'
)


def _chatml(name: str, class_name: str, default_system: str = "") -> Style:
    return Style(
        name,
        class_name,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        default_system=default_system,
        user="{system}<|im_start|>user\n{prompt}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        answer="{answer}<|im_end|>",
        after="\n",
        stop=(("<|im_end|>",),),
    )


# Texts are those of LitGPT 0.5, which finetunes depend on; where one was mended, a comment says what.
STYLES = (
    Style("default", "Default", user="{prompt}"),
    Style(
        "alpaca",
        "Alpaca",
        default_system=TASK.format(""),
        user=INSTRUCTION,
        assistant=RESPONSE,
        between="\n\n",
        default_system_with_input=TASK_WITH_CONTEXT,
        user_with_input=INSTRUCTION + "### Input:\n{input}\n\n",
    ),
    Style("flan", "FLAN", default_system=TASK.format(""), user=INSTRUCTION, assistant=RESPONSE, between="\n\n"),
    Style(
        "longform", "Longform", default_system=TASK_WITH_CONTEXT, user=INSTRUCTION, assistant=RESPONSE, between="\n\n"
    ),
    Style(
        "stablelm-alpha",
        "StableLMAlpha",
        system="<|SYSTEM|>{system}",
        default_system=(
            "# StableLM Tuned (Alpha version)\n- StableLM is a helpful and harmless open-source AI language model "
            "developed by StabilityAI.\n- StableLM is excited to be able to help the user, but will refuse to do "
            "anything that could be considered harmful to the user.\n- StableLM is more than just an information "
            "source, StableLM is also able to write poetry, short stories, and make jokes.\n- StableLM will refuse to "
            "participate in anything that could harm a human."
        ),
        user="{system}<|USER|>{prompt}",
        assistant="<|ASSISTANT|>",
        answer="{answer}",
        stop=(("<|SYSTEM|>",), ("<|ASSISTANT|>",), ("<|USER|>",)),
    ),
    Style(
        "stablelm-zephyr",
        "StableLMZephyr",
        user="<|user|>\n{prompt}<|endoftext|>\n",
        assistant="<|assistant|>\n",
        answer="{answer}<|endoftext|>",
        after="\n",
    ),
    Style(
        "falcon",
        "Falcon",
        user="{prompt}\n",
        assistant="Answer:",
        between="\n",
        stop=(("User", ":"), ("\n", "User")),
    ),
    Style(
        "falcon3",
        "Falcon3",
        user="<|user|>\n{prompt}<|endoftext|>\n",
        assistant="<|assistant|>\n",
        answer="{answer}<|endoftext|>",
        after="\n",
        stop=(("<|endoftext|>",),),
    ),
    Style(
        "llama2-function-calling",
        "Llama2FunctionCalling",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=(
            "You are a helpful, respectful and honest assistant. Always answer as helpfully aspossible. "  # as tuned
            "Your only response should be JSON formatted functions"
        ),
        begin=f"<FUNCTIONS>{SEARCH_BING}</FUNCTIONS>\n\n",
        user="[INST]{system}{prompt}[/INST]\n\n",
        between="{bos}",
        strips_system=True,
    ),
    # Mended: 0.5 put a space before the prompt and one after [/INST], which Meta's template does not have.
    Style(
        "llama2",
        "Llama2",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=(
            "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
            "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
            "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a "
            "question does not make any sense, or is not factually coherent, explain why instead of answering "
            "something not correct. If you don't know the answer to a question, please don't share false information."
        ),
        user="[INST] {system}{prompt} [/INST]",
        answer=" {answer} {eos}",
        between="{bos}",
    ),
    Style(
        "freewilly2",
        "FreeWilly2",
        system="### System:\n{system}\n\n",
        default_system="This is a system prompt, please behave and help the user.",
        user="{system}### User:\n{prompt}\n\n",
        assistant="### Assistant:\n",
        between="\n\n",
    ),
    Style("platypus", "Platypus", user="### Instruction:\n\n{prompt}\n\n", assistant=RESPONSE, between="\n\n"),
    Style("stablecode", "StableCode", user="###Instruction\n{prompt}", assistant="###Response\n"),
    Style(
        "codellama",
        "CodeLlama",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        user="[INST] {system}{prompt} [/INST]",
        answer=" {answer} {eos}",
        between="{bos}",
    ),
    Style(
        "phi-1",
        "Phi1",
        user="{prompt}\n\n",
        assistant="Answer:",
        between="\n",
        stop=(("Answer", ":"), ("\n", "Answer", ":")),
    ),
    Style("phi-2", "Phi2", user="Instruct: {prompt}\n", assistant="Output:", between="\n"),
    # Its eos is <|endoftext|>, but its answers end with <|end|>: 0.5 talked on.
    Style(
        "phi-3",
        "Phi3",
        system="<|system|>\n{system}<|end|>\n",
        default_system="You are a helpful assistant.",
        user="{system}<|user|>\n{prompt}<|end|>\n",
        assistant="<|assistant|>\n",
        answer="{answer}<|end|>",
        after="\n",
        stop=(("<|end|>",), ("<|assistant|>",)),
    ),
    Style(
        "phi-4",
        "Phi4",
        system="<|im_start|>system<|im_sep|>{system}<|im_end|>",
        user="{system}<|im_start|>user<|im_sep|>{prompt}<|im_end|>",
        assistant="<|im_start|>assistant<|im_sep|>",
        answer="{answer}<|im_end|>",
        stop=(("<|im_end|>",),),
    ),
    # Mended: 0.5 began with <|im_start>, a bar short of the token.
    Style(
        "phi-4-reasoning",
        "Phi4Reasoning",
        system="<|im_start|>system<|im_sep|>{system}<|im_end|>",
        default_system=(
            "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves "
            "thoroughly exploring questions through a systematic thinking process before providing the final precise "
            "and accurate solutions. This requires engaging in a comprehensive cycle of analysis, summarizing, "
            "exploration, reassessment, reflection, backtracing, and iteration to develop well-considered thinking "
            "process. Please structure your response into two main sections: Thought and Solution using the specified "
            "format: <think> {Thought section} </think> {Solution section}. In the Thought section, detail your "
            "reasoning process in steps. Each step should include detailed considerations such as analysing questions, "
            "summarizing relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, "
            "refining any errors, and revisiting previous steps. In the Solution section, based on various attempts, "
            "explorations, and reflections from the Thought section, systematically present the final solution that "
            "you deem correct. The Solution section should be logical, accurate, and concise and detail necessary "
            "steps needed to reach the conclusion. Now, try to solve the following question through the above "
            "guidelines:"
        ),
        user="{system}<|im_start|>user<|im_sep|>{prompt}<|im_end|>",
        assistant="<|im_start|>assistant<|im_sep|>",
        answer="{answer}<|im_end|>",
        stop=(("<|im_end|>",),),
    ),
    Style(
        "phi-4-mini",
        "Phi4Mini",
        system="<|system|>{system}<|end|>",
        user="{system}<|user|>{prompt}<|end|>",
        assistant="<|assistant|>",
        answer="{answer}<|end|>",
        stop=(("<|end|>",),),
    ),
    Style(
        "phi-4-mini-reasoning",
        "Phi4MiniReasoning",
        system="<|system|>{system}<|end|>",
        default_system="Your name is Phi, an AI math expert developed by Microsoft.",
        user="{system}<|user|>{prompt}<|end|>",
        assistant="<|assistant|>",
        answer="{answer}<|end|>",
        stop=(("<|end|>",),),
    ),
    Style(
        "tinyllama",
        "TinyLlama",
        system="<|system|>\n{system}</s>\n",
        default_system="You are a friendly chatbot who always gives helpful, detailed, and polite answers.",
        user="{system}<|user|>\n{prompt}</s>\n",
        assistant="<|assistant|>\n",
        answer="{answer}</s>",
        after="\n",
    ),
    # Its eos is <eos>, but its answers end with <end_of_turn>: 0.5 talked on.
    Style(
        "gemma",
        "Gemma",
        user="<start_of_turn>user\n{prompt}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        answer="{answer}<end_of_turn>",
        after="\n",
        stop=(("<end_of_turn>",),),
    ),
    Style(
        "llama3",
        "Llama3",
        begin="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        default_system="You are a helpful assistant.",
        user="{system}<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{answer}<|eot_id|>",
        strips=("system", "user", "assistant"),
        stop=(("<|eot_id|>",),),
    ),
    # Mended: in 0.5 earlier answers of a conversation lacked the token that ends them.
    Style(
        "r1-base",
        "R1Base",
        user="{system}<\uff5cUser\uff5c>{prompt}",
        assistant="<\uff5cAssistant\uff5c>",
        answer="{answer}<\uff5cend\u2581of\u2581sentence\uff5c>",
        strips=("user", "assistant"),
        stop=(("<\uff5cend\u2581of\u2581sentence\uff5c>",),),
    ),
    Style(
        "olmo",
        "OLMo",
        begin="<|endoftext|>",
        user="<|user|>\n{prompt}\n",
        assistant="<|assistant|>\n",
        between="\n",
    ),
    _chatml("chatml", "ChatML"),
    _chatml("qwen2.5", "Qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _chatml("qwen2.5-math", "Qwen2_5_Math", "Please reason step by step, and put your final answer within \\boxed{}."),
    _chatml(
        "qwq",
        "QwQ",
        "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step.",
    ),
    _chatml("qwen3", "Qwen3"),
    _chatml("smollm2", "SmolLM2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    _chatml(
        "salamandra",
        "Salamandra",
        "I am Salamandra, an AI language model developed at the Barcelona Supercomputing Centre (BSC) by the Language "
        "Technologies Unit. My knowledge base was last updated on August 2023. Today Date: 2024-09-30\nSoy Salamandra, "
        "un modelo lingüístico de IA desarrollado en el Barcelona Supercomputing Centre (BSC) por la Language "
        "Technologies Unit. Mi base de conocimientos se actualizó por última vez en agosto de 2023.\nSoc Salamandra, "
        "un model de llenguatge d'IA desenvolupat al Barcelona Supercomputing Centre (BSC) per la Language "
        "Technologies Unit.",
    ),
)
DEFAULT = STYLES[0]


# ------------------------------------------------------------------------------------------------ chat templates


@dataclass(frozen=True)
class ChatTemplate(PromptStyle):
    """A Jinja template in the way of Hugging Face tokenizers, run in a sandbox."""

    template: str
    tool_template: str | None = None  # used instead where tools are given
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Text of special tokens that the template may name: `bos_token`, `eos_token`, ..."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More that the template may name, such as `enable_thinking`."""
    source: str = "chat template"
    """What errors call it."""

    name = "chat-template"
    adds_bos = False  # the template says whether and where

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that comes with a tokenizer."""
        template = tokenizer.chat_template
        if template is None:
            return None
        source = f"{tokenizer.dir}: chat template"
        return cls(template, tokenizer.chat_templates.get("tool_use"), tokenizer.special_tokens, source=source)

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        if isinstance(prompt, str):
            extra = fields.get("input")
            prompt = [{"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}]
        return self.render(with_system(prompt, sys_prompt))

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Beside eos, the token that the template puts behind an answer."""
        ends = super().stop_tokens(tokenizer)
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SPAN[0]}]
            text = self.render(turns, add_generation_prompt=False)
        except InputError:
            return ends
        found = tokenizer.control_pattern and tokenizer.control_pattern.match(text.rpartition(SPAN[0])[2].lstrip())
        own = [tokenizer.token_to_id(found[0])] if found else []
        return ends if not own or own in ends else [*ends, own]

    def jinja(self, *, adds_bos: bool) -> str | None:
        return self.template

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        def run(messages: list[dict[str, Any]], add_generation_prompt: bool, span: tuple[str, str] = NO_SPAN) -> str:
            given: dict[str, Any] = {"documents": None, **self.tokens, **tokens, **_plain(self.variables)}
            given |= {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                SPAN_NAME: span,
            }
            return self._run(given, with_tools=tools is not None)

        messages = [_with_reasoning(message) for message in messages]
        if span == NO_SPAN or GENERATION.search(self.template):
            return run(messages, add_generation_prompt, span)
        return mark_answers(messages, run, self.source)

    def _run(self, given: dict[str, Any], with_tools: bool) -> str:
        import jinja2

        compiled = self._compiled_tools if with_tools and self._compiled_tools else self._compiled
        try:
            return compiled.render(given)
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"{self.source} tries what no template may: {error}; use --prompt_style") from None
        except Exception as error:  # a template can raise anything that Python can
            raise InputError(f"{self.source} does not take this conversation: {_one_line(error)}") from None

    def check(self) -> None:
        """InputError where the template is not Jinja."""
        _ = self._compiled, self._compiled_tools

    @cached_property
    def _compiled(self) -> Any:
        return self._compile(self.template)

    @cached_property
    def _compiled_tools(self) -> Any:
        return self._compile(self.tool_template) if self.tool_template else None

    def _compile(self, template: str) -> Any:
        try:
            return sandbox().from_string(template)
        except Exception as error:  # the parser also lets ValueError and RecursionError through
            raise InputError(f"{self.source} is not valid Jinja: {_one_line(error)}; use --prompt_style") from None


def mark_answers(messages: list[dict[str, Any]], run: Callable[..., str], source: str) -> str:
    """The text of a conversation with marks around its answers, for a template without generation tags.

    Marks go into the messages and are found again in the text. An answer begins behind what `add_generation_prompt`
    adds, where that stands before it, and ends with the token behind it.
    """
    answers = [m for m in messages if m["role"] == "assistant"]
    if any(m.get("tool_calls") or not isinstance(m.get("content"), str) for m in answers):
        raise InputError(f"{source} needs {{% generation %}} tags for training on answers with tool calls")
    marked = run([_marked(m) if m["role"] == "assistant" else m for m in messages], False)
    text = run(messages, False)
    if marked.translate(UNSPANNED) != text or marked.count(SPAN[1]) != len(answers):
        raise InputError(f"{source} rewrites answers, so what to train on is unclear; add {{% generation %}} tags")
    prompted = run(messages, True)
    header = prompted[len(text) :] if prompted.startswith(text) else ""
    *answered, rest = END_OF_TURN.sub(rf"\1{SPAN[1]}", marked).split(SPAN[1])
    return "".join(_opened(answer, header, source) + SPAN[1] for answer in answered) + rest


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with marks inside the space around its text, which templates may strip."""
    content = message["content"]
    core = content.strip()
    before, _, after = content.partition(core) if core else ("", "", content)
    return {**message, "content": before + SPAN[0] + core + SPAN[1] + after}


def _opened(answer: str, header: str, source: str) -> str:
    """Text up to the end of an answer, its first mark moved to the end of `header`."""
    begin = answer.find(SPAN[0])
    at = answer.rfind(header, 0, begin if begin >= 0 else len(answer)) if header else -1
    at = at + len(header) if at >= 0 else begin
    if at < 0:
        raise InputError(f"{source} hides where answers begin; add {{% generation %}} tags")
    bare = answer.replace(SPAN[0], "")
    return bare[:at] + SPAN[0] + bare[at:]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under every name that templates read it by, as in transformers."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = next((message[name] for name in names if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


@cache
def sandbox() -> Any:
    """The Jinja environment of chat templates: names and tags as in transformers, without a way out."""
    from jinja2 import ext, nodes, pass_context
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """`{% generation %}` ... `{% endgeneration %}` around what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

        @pass_context
        def _wrap(self, context: Any, caller: Callable[[], str]) -> str:
            return caller().join(context[SPAN_NAME])

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"reaches for {attribute!r} of a {type(obj).__name__}")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _is_huge(operator, left, right):
                raise SecurityError(f"computes something huge with {operator!r}")
            return super().call_binop(context, operator, left, right)

    class PublicNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"sets {name!r} of a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PublicNamespace,
    }
    return environment


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    """Whether a product or power would take the machine's memory or time."""
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096
    counts = [len(x) if isinstance(x, (str, bytes, list, tuple)) else x for x in (left, right)]
    repeats = any(isinstance(x, (str, bytes, list, tuple)) for x in (left, right))
    return repeats and all(isinstance(n, int) for n in counts) and counts[0] * counts[1] > 1_000_000


# ------------------------------------------------------------------------------- messages, and marks in their text

# Characters that Unicode sets aside for a program's own use inside; in messages they are replaced.
PLAIN = ("\ufdd0", "\ufdd1")  # around a control token that a message holds as text
SPAN = ("\ufdd2", "\ufdd3")  # around what the assistant wrote
NO_SPAN = ("", "")
SPAN_NAME = "litgpt_span"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
END_OF_TURN = re.compile(rf"{SPAN[1]}(\s?<[^<>\s\ufdd0-\ufdd3]+>)")
MARKS = re.compile("\ufdd0([^\ufdd0-\ufdd3]*)\ufdd1|([\ufdd0-\ufdd3])")
UNSPANNED = {ord(mark): None for mark in SPAN}
UNMARKED = {ord(mark): "\ufffd" for mark in PLAIN + SPAN}


class Guard:
    """Marks the control tokens that stand in messages, so that they are encoded as the text that they are.

    An assistant may write those that it can have written itself, such as `<think>`: they are not special.
    """

    def __init__(self, tokenizer: Tokenizer, lets_pass: bool = False) -> None:
        self._control = None if lets_pass else tokenizer.control_pattern
        self._hidden = None if lets_pass else tokenizer.hidden_pattern

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._walk(message, self._hidden if message["role"] == "assistant" else self._control)

    def value(self, value: Any) -> Any:
        return self._walk(value, self._control)

    def _walk(self, value: Any, tokens: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            text = value.translate(UNMARKED)
            return tokens.sub(rf"{PLAIN[0]}\1{PLAIN[1]}", text) if tokens else text
        if isinstance(value, dict):
            return {key: self._walk(item, tokens) for key, item in value.items()}
        return [self._walk(item, tokens) for item in value] if isinstance(value, list) else value


def read_marks(marked: str) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """Splits marked text into parts `(text, whether its control tokens are special)` and spans of answers."""
    parts: list[tuple[str, bool]] = [("", True)]
    spans: list[tuple[int, int]] = []
    at = begin = 0
    pieces = MARKS.split(marked)  # text, plain text or None, a lone mark or None, text, ...
    for i, piece in enumerate(pieces):
        if piece in SPAN:
            begin = at if piece == SPAN[0] else begin
            spans += [(begin, at)] if piece == SPAN[1] else []
        elif piece in PLAIN:
            parts.append(("", True))  # a template cut the mark's pair apart: the halves must not join to a token
        elif piece:
            special = i % 3 != 1
            if special and parts[-1][1]:
                parts[-1] = (parts[-1][0] + piece, True)
            else:
                parts.append((piece, special))
            at += len(piece)
    return [part for part in parts if part[0]], spans


def _mask(encoded: Encoded, spans: Iterable[tuple[int, int]]) -> list[bool]:
    mask = [False] * len(encoded.ids)
    for begin, end in spans:
        for i, (start, stop) in enumerate(encoded.spans):
            # an id without a character of its own (the first bytes of one) belongs to where it stands
            mask[i] |= start < end and (stop > begin or start == stop == begin)
    return mask


def with_system(messages: Sequence[Message], sys_prompt: str | None) -> list[Message]:
    """The conversation with a system message first, unless it has one."""
    if not sys_prompt or any(isinstance(m, Mapping) and m.get("role") == "system" for m in messages):
        return list(messages)
    return [{"role": "system", "content": sys_prompt}, *messages]


def _plain(value: Any) -> Any:
    """Messages or tools as plain data, all that a template may see; entries that are None are left out."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # without what a subclass adds
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise InputError(f"a conversation holds text, numbers, lists and mappings, not {type(value).__name__}")


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, checked and as plain data."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise InputError("a conversation is a list of messages such as {'role': 'user', 'content': 'Hello'}; give one")
    plain = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} needs a 'role' (system, user or assistant) and 'content'")
        plain.append({key: _plain(value) for key, value in message.items() if value is not None})
    return plain


def _take_system(messages: list[dict[str, Any]], strips: Sequence[str] = ()) -> tuple[str | None, list[dict[str, Any]]]:
    """The system text and the turns, for styles: text alone, from a user and an assistant."""
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message.get("content")
        if role not in ("user", "assistant") and (role, number) != ("system", 1):
            raise InputError(f"message {number}: this prompt style has no place here for the role {role!r}")
        if not isinstance(content, str):
            raise InputError(f"message {number}: this prompt style takes text as 'content'")
        turns.append({**message, "content": content.strip() if role in strips else content})
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    return system, turns


def _one_line(error: Exception) -> str:
    where = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
    return " ".join(str(error).split()) + where or type(error).__name__


# ------------------------------------------------------------------------------------------ choosing and keeping


def from_name(name: str) -> PromptStyle:
    """The style of this name in the table, or of the class name that LitGPT 0.5 had for it."""
    known = {style.name: style for style in STYLES} | {style.class_name: style for style in STYLES}
    if name not in known:
        names = [style.name for style in STYLES]
        raise InputError(f"prompt style {name!r} is not known{near_miss(name, names)} (all: {', '.join(names)})")
    return known[name]


def choose(
    directory: str | Path,
    tokenizer: Tokenizer,
    family_prompt: str | None,
    override: str | Path | PromptStyle | None = None,
) -> PromptStyle:
    """The style of a checkpoint: `override`, else the one saved there, else the tokenizer's chat template, else the
    family's, else none. `override` is a style, its name, or a Jinja file.
    """
    if isinstance(override, PromptStyle):
        return override
    if override is not None:
        path = Path(override)
        return from_file(path, tokenizer) if path.suffix == ".jinja" else from_name(str(override))
    saved = load(directory)
    if saved is not None:
        return saved
    template = ChatTemplate.of(tokenizer)
    if template is not None:
        template.check()
        return template
    return from_name(family_prompt) if family_prompt else DEFAULT


def from_file(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """A chat template in a file of its own."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--prompt_style {path}: cannot be read as text ({_one_line(error)})") from None
    template = ChatTemplate(text, tokens=tokenizer.special_tokens, source=str(path))
    template.check()
    return template


def load(directory: str | Path) -> PromptStyle | None:
    """The style that was saved in a directory, by us or by LitGPT 0.5. A class that is not ours is never imported."""
    path = Path(directory) / STYLE_FILE
    if not path.is_file():
        return None
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)}); mend it or use --prompt_style") from None
    class_path = entry.get("class_path") if isinstance(entry, dict) else None
    if not isinstance(class_path, str) or not class_path.startswith(NAMESPACE):
        raise InputError(
            f"{path}: class_path {class_path!r} is not one of {NAMESPACE}*; remove it or use --prompt_style"
        )
    try:
        return from_name(class_path.removeprefix(NAMESPACE))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(style: PromptStyle, directory: str | Path) -> None:
    """Keeps a style beside a checkpoint: by name, and as the chat template that other programs read.

    The tokenizer's files must be there already. A style of the user's own class cannot be kept.
    """
    directory = Path(directory)
    if isinstance(style, Style):
        entry = {"class_path": NAMESPACE + style.class_name}
        (directory / STYLE_FILE).write_text(yaml.safe_dump(entry), encoding="utf-8")
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer(directory) if has_tokenizer else None
    template = style.jinja(adds_bos=tokenizer is not None and bool(tokenizer.encode("")))
    if template is not None and (tokenizer is None or template != tokenizer.chat_template):
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
