"""A worker process: life and HTTP (`main`), the text side (`text`), the two halves of an answer (`prefill`, `decode`)."""
