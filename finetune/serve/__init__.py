"""An OpenAI-compatible server on the model that was trained: base and adapters, many requests at once."""
