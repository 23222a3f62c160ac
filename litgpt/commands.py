"""What `litgpt` can do: each action, the function that does it, and one line of help. Nothing else."""

from __future__ import annotations

Command = tuple[str, str]  # ("module:function", one line of help)

SECTIONS: dict[str, dict[str, Command]] = {
    "Get a model": {
        "download": (
            "litgpt.scripts.download:main",
            "Download a checkpoint from the Hugging Face Hub, or list the models that are known",
        ),
    },
    "Train": {
        "train_tokenizer": ("litgpt.scripts.train_tokenizer:main", "Train a tokenizer on your own text"),
        "pretrain": ("litgpt.pretrain:main", "Train a model on text, from scratch or from a checkpoint"),
        "finetune": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA (short for finetune_lora)"),
        "finetune_lora": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA or QLoRA"),
        "finetune_full": ("litgpt.finetune.full:setup", "Finetune all weights of a model"),
        "finetune_adapter": ("litgpt.finetune.adapter:setup", "Finetune a model with LLaMA-Adapter"),
        "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "Finetune a model with LLaMA-Adapter v2"),
        "merge_lora": ("litgpt.scripts.merge_lora:main", "Merge LoRA weights into their base model"),
        "preview_data": (
            "litgpt.scripts.preview_data:main",
            "Show samples as a model would see them, with the trained tokens marked",
        ),
    },
    "Use": {
        "chat": ("litgpt.chat.base:main", "Talk to a model"),
        "generate": ("litgpt.generate.base:main", "Generate text from a prompt"),
        "generate_full": ("litgpt.generate.full:main", "Generate with a fully finetuned model (as generate)"),
        "generate_adapter": ("litgpt.generate.adapter:main", "Generate with an adapter (as generate)"),
        "generate_adapter_v2": ("litgpt.generate.adapter_v2:main", "Generate with an adapter v2 (as generate)"),
        "generate_sequentially": (
            "litgpt.generate.sequentially:main",
            "Generate with the layers spread over several devices",
        ),
        "generate_speculatively": (
            "litgpt.generate.speculative_decoding:main",
            "Generate with guesses, of a small draft model or from the text, that a large model checks",
        ),
        "generate_tp": ("litgpt.generate.tp:main", "Generate with every layer split over several devices"),
        "serve": ("litgpt.deploy.serve:main", "Serve a model over HTTP, with OpenAI's API"),
    },
    "Check": {
        "evaluate": ("litgpt.eval.evaluate:main", "Score a model on benchmark tasks, or on a text"),
        "validate": ("litgpt.scripts.validate:main", "Check the files of a checkpoint"),
    },
    "Convert": {
        "convert_to_litgpt": (
            "litgpt.scripts.convert_to_litgpt:main",
            "Write lit_model.pth beside Hugging Face weights, for earlier versions",
        ),
        "convert_from_litgpt": (
            "litgpt.scripts.convert_from_litgpt:main",
            "Write a lit_model.pth as Hugging Face weights",
        ),
        "convert_pretrained_checkpoint": (
            "litgpt.scripts.convert_pretrained_checkpoint:main",
            "Cut a training checkpoint down to the model",
        ),
    },
}

COMMANDS: dict[str, Command] = {action: command for actions in SECTIONS.values() for action, command in actions.items()}
