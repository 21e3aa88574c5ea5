"""Settings of a language model elsewhere: any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import os

from pydantic import Field, field_validator

from matpo.errors import UserError
from matpo.redaction import conceal
from matpo.section import Section


class Endpoint(Section):
    """Where it answers and how patient to be with it."""

    url: str
    """Up to the version, say `https://api.openai.com/v1`; `/chat/completions` is added."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself never stands in a config."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Of one try."""
    tries: int = Field(default=4, ge=1)
    """A try that fails is made again after 1, 2, 4 … seconds, or when the server says."""
    max_inflight: int = Field(default=32, ge=1)

    @field_validator("url")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or "?" in value or "@" in value:
            raise ValueError("an address such as https://host/v1, without user, password or query (see api_key_env)")
        return value.rstrip("/")

    def api_key(self) -> str | None:
        """The key, struck out of every log from now on. Raises `UserError` where the variable is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise UserError(f"api_key_env = {self.api_key_env!r} is not set; export {self.api_key_env}=…")
        conceal(self.api_key_env, key)
        return key
