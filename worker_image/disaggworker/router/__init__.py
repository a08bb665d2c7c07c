"""The router: takes OpenAI requests, hands each through a prefill and a decode instance, and says what users saw."""
