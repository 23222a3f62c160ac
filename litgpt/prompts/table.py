"""The prompt styles that have a name. Data.

The texts are those of LitGPT 0.5, which finetunes depend on; where one was mended, a comment says what.
"""

from __future__ import annotations

from litgpt.prompts.pieces import Style

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
