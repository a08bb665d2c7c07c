"""A conversation as one prompt, by the checkpoint's own template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from disaggworker.errors import RequestError, StartError

_PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """The template of tokenizer_config.json or chat_template.jinja, or a plain one. It runs in jinja2's sandbox."""

    def __init__(self, folder: Path) -> None:
        """Raises `StartError` for a template that does not parse."""
        path = folder / "tokenizer_config.json"
        try:
            config: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as e:
            raise StartError(f"{path} is not JSON: {e}.") from None
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if (alone := folder / "chat_template.jinja").is_file():
            source = alone.read_text()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source or _PLAIN)
        except jinja2.TemplateSyntaxError as e:
            raise StartError(f"The chat template in {folder} does not parse: {e.message}.") from None
        self._tokens = {
            name: value["content"] if isinstance(value, Mapping) else value
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := config.get(name))
        }

    def render(self, messages: Any) -> str:
        """The prompt. Raises `RequestError` for messages that are none, or that the template refuses."""
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list of at least one message.", param="messages")
        plain = []
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(
                    "Each of messages must be an object with a role and a content.", param="messages"
                )
            plain.append({**message, "content": _text(message.get("content"))})
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError) as e:
            raise RequestError(
                f"The model's chat template refuses these messages: {e}.", param="messages"
            ) from None


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise RequestError("A message's content must be a string or a list of text parts.", param="messages")
