"""`litgpt convert_from_litgpt`: a `lit_model.pth`, or any checkpoint of ours, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path


def main(checkpoint_dir: Path, output_dir: Path, overwrite: bool = False) -> None:
    """Write a lit_model.pth, or any checkpoint, as a Hugging Face directory of its own.

    Args:
        checkpoint_dir: Directory with lit_model.pth and model_config.yaml, or a checkpoint of this version.
        output_dir: Where to write config.json, safetensors and the tokenizer's files.
        overwrite: Replace what is in `output_dir`.
    """
    from litgpt.checkpoint import find
    from litgpt.scripts.source import open_lit_model, write_hugging_face

    opened = open_lit_model(find(checkpoint_dir))
    opened.config.to_hf()  # refuses a model that no Hugging Face family has
    write_hugging_face(opened, output_dir, overwrite=overwrite)
    print(f"Wrote the model ({opened.config.family}) as Hugging Face files to {output_dir}.")
    print(f"What it is good for: litgpt validate {output_dir}")
