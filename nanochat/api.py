"""What requests to the server may say, and the form of its answers: the chat page's protocol and OpenAI's."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator, model_validator

from nanochat.tokenizer import SPECIAL_TOKENS

MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8000
MAX_CONVERSATION_CHARACTERS = 32000
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 100
MAX_CHOICES = 16
NOT_JSON = "the request's body is not JSON in UTF-8"

Temperature = Annotated[StrictFloat | StrictInt, Field(ge=0, le=2)]
TopP = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)]
MaxTokens = Annotated[StrictInt, Field(ge=1, le=4096)]
Seed = Annotated[StrictInt, Field(ge=-2**63, lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
# what OpenAI's API has beyond ours: these values ask for nothing, any other is refused
ASKS_NOTHING = {"logprobs": (None, False), "top_logprobs": (None, 0), "tools": (None, []), "functions": (None, []),
                "tool_choice": (None, "none", "auto"), "function_call": (None, "none", "auto"), "logit_bias": (None, {}),
                "response_format": (None, {"type": "text"}), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
                "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,)}


class Part(BaseModel):
    """A part of a message: text, a call of the calculator, or its result."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    """One turn. Assistants' turns may consist of parts."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    parts: list[Part] | None = Field(None, description="an assistant's message as the server gave it; goes before content")

    @property
    def characters(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _is_acceptable(self):
        if self.role == "assistant":
            self.content = self.parts or self.content or ""
        elif self.content is None:
            raise ValueError("it has no content")
        text = self.characters
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise ValueError("the text holds half of a surrogate pair, which is no character")
        if len(text) > MAX_MESSAGE_CHARACTERS:
            raise ValueError(f"a message of {len(text)} characters, at most {MAX_MESSAGE_CHARACTERS} are taken")
        reserved = next((token for token in SPECIAL_TOKENS if token in text), None)
        if reserved:
            raise ValueError(f"the text contains {reserved}, which is reserved for the conversation's structure")
        if self.role != "assistant" and not isinstance(self.content, str):
            if any(part.type != "text" for part in self.content):
                raise ValueError("only assistants' messages have parts other than text")
            self.content = text
        return self


class Conversation(BaseModel):
    """The messages and settings that both protocols share; what is left out is the server's default."""

    model_config = ConfigDict(strict=True)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=200)] | None = Field(None, description="0: among all tokens")
    max_tokens: MaxTokens | None = None
    seed: Seed | None = Field(None, description="the same seed, the same answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    @field_validator("messages")
    @classmethod
    def _end_with_the_user(cls, messages):
        characters = sum(len(message.characters) for message in messages)
        if characters > MAX_CONVERSATION_CHARACTERS:
            raise ValueError(f"{characters} characters in all messages, at most {MAX_CONVERSATION_CHARACTERS} are taken")
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def turns(self) -> list[dict]:
        """The conversation as the model knows it: user and assistant alternate, the user begins. Instructions (system)
        become the head of the next user message; several messages of one side become one."""
        turns: list[dict] = []
        for message in self.messages:
            role = "assistant" if message.role == "assistant" else "user"
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] = _joined(turns[-1]["content"], message.content)
            elif turns or role == "user":  # an assistant's greeting before anything was said is left out
                turns.append({"role": role, "content": _plain(message.content)})
        return turns


class ChatRequest(Conversation):
    """POST /chat/completions."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class CompletionRequest(Conversation):
    """POST /v1/chat/completions, as OpenAI's client sends it."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str = Field(max_length=200)
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_completion_tokens: MaxTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self):
        for name, values in ASKS_NOTHING.items():
            if name in self.model_extra and self.model_extra[name] not in values:
                raise ValueError(f"{name} is not supported here")
        return self


def _plain(content) -> str | list[dict]:
    return content if isinstance(content, str) else [part.model_dump() for part in content]


def _joined(first, second) -> str | list[dict]:
    second = _plain(second)
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    as_parts = [content if isinstance(content, list) else [{"type": "text", "text": content}] for content in (first, second)]
    return as_parts[0] + as_parts[1]


def reason(errors: list[dict]) -> tuple[str, str]:
    """(field, what is wrong with it) from pydantic's list of errors; what the client sent is not repeated."""
    # where there are alternatives, that which came furthest
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    if error["type"] == "json_invalid":
        return "", NOT_JSON
    if error["loc"] == ("body",) and error["type"] != "value_error":
        return "", "the request has no body" if error["type"] == "missing" else \
            "the request's body is no JSON object (is there a header Content-Type: application/json?)"
    place = [str(part) for part in error["loc"] if part != "body" and not str(part)[:1].isupper() and "[" not in str(part)
             and part not in ("str", "constrained-str", "float", "int")]
    text = error["msg"].removeprefix("Value error, ")
    return ".".join(place), text[:1].lower() + text[1:]


def event(data: dict | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def text_of(pieces) -> str:
    """What a reader of plain text gets of an answer: its text, without the tool calls."""
    return "".join(text for kind, text in pieces if kind == "text")


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens}}
