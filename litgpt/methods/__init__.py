"""Ways to finetune, as transforms of the model that exists: full, LoRA, LLaMA-Adapter and its second version."""
