"""The HTTP side: OpenAI's endpoints over `finetune.serve.service`."""
