"""Which targets there are; nothing is imported for it."""

NAMES = (
    *("config", "generation", "ahn-settings", "safetensors", "index", "model", "card"),
    *("pickles", "gguf", "gguf-tokenizer", "memory", "memory-session", "training", "metrics"),
    *("jsonl", "text", "html", "pdf", "epub", "docx", "archive", "template", "tokenizer"),
    *("records", "predictions", "chat", "completions", "responses", "messages", "stored", "paths"),
)
