"""Supervised fine-tuning of the adapter: `accelerate launch -m finetune.train RECIPE|RUN`."""
