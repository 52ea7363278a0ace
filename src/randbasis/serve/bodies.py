"""What clients send and get, as OpenAI's API has it; what is asked for and cannot be done is refused, not ignored."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from randbasis.serve.requests import SEEDS

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_LOGPROBS = 20

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(min_length=1)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}
"""Parameters of OpenAI's that mean nothing with these values, and cannot be done with others."""


class Body(BaseModel):
    """A body: no field that is not known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = dict(cast("dict[str, Any]", value))
        for name, neutral in NEUTRAL.items():
            if name in fields and name not in cls.model_fields:
                if fields[name] not in neutral or isinstance(fields[name], bool) != isinstance(neutral[-1], bool):
                    raise ValueError(f"{name} is not supported here, got {fields[name]!r}; leave it out")
                del fields[name]
        return fields


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class SamplingBody(Body):
    """What completions and chats have in common."""

    model: Text
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers of one prompt.")
    seed: int | None = Field(None, ge=-(SEEDS // 2), lt=SEEDS // 2, description="Of the draws; else one is drawn.")
    stop: Stop | list[Stop] | None = Field(None, description="Texts that end an answer.", max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Taken, and not used.")

    @model_validator(mode="after")
    def _check_stream(self) -> "SamplingBody":
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise ValueError(f"stop must be at most {MOST_STOPS} texts, got {len(self.stop)}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream, got no stream; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(SamplingBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1, description="16 by default.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatBody(SamplingBody):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="By default what the model has room for.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same, by its newer name.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true; set it, or leave top_logprobs out")
        return self


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    model: Text
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, max_length=256, description="Taken, and not used.")


class ClassifyBody(Body):
    """``POST /v1/classify``."""

    model: Text
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    user: str | None = Field(None, max_length=256, description="Taken, and not used.")


class LoadBody(BaseModel):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=255)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(BaseModel):
    """``POST /v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=255)]


# --- answers ---


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class ModelCard(BaseModel):
    """One model that a key may name; fields of vLLM's and a few of ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "randbasis"
    root: str
    parent: str | None = None
    version: int | None = None
    method: str | None = None
    bytes: int | None = None
    resident: bool = True


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """``GET /health``."""

    status: Literal["ok", "draining", "failed"]
    reason: str | None = None


class Embedded(BaseModel):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The vectors of one request."""

    object: Literal["list"] = "list"
    data: list[Embedded]
    model: str
    usage: Usage


class Classified(BaseModel):
    """One row's class and the probabilities of all."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    labels: list[str]


class ClassifiedList(BaseModel):
    """The classes of one request."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class CompletionAnswer(BaseModel):
    """A whole completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class ChatAnswer(BaseModel):
    """A whole answer of a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage
