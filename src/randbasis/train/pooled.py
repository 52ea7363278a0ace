"""A text encoder without a classification head of its own: pooled hidden states and one linear layer."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from randbasis.train.machine import Quantized
from randbasis.train.model_reading import read_model


class PooledClassifier(PreTrainedModel):
    """``classifier(dropout(pool(encoder(x))))``.

    Sentence encoders are pretrained with a mean over the tokens, and not with the pooler on the first token that the
    head of ``AutoModelForSequenceClassification`` reads. Neither transformers nor plain PEFT can load this class.

    Args:
        config: of the encoder, with ``num_labels`` set; one label is a regression.
        encoder: maps tokens to hidden states ``[batch, length, hidden]``.
        pooling: ``"mean"`` over the attended tokens, or ``"cls"``, the first token.
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel, pooling: str):
        super().__init__(config)
        self.pooling = pooling
        self.encoder = encoder
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0))
        self.classifier = nn.Linear(cast(int, config.hidden_size), cast(int, config.num_labels))
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_encoder(
        cls, name: str, *, num_labels: int, pooling: str, dtype: str, quantized: Quantized | None = None
    ) -> "PooledClassifier":
        """The encoder of a folder or hub name with a fresh head, drawn from torch's current generator.

        Raises:
            DataMissingError: the encoder cannot be read.
            PartialModelError: weights that are used are missing.
        """
        encoder, _ = read_model(AutoModel, name, dtype, quantized=quantized)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # not used here, so nothing of it should be adapted
        config = encoder.config
        config.num_labels = num_labels
        model = cls(config, encoder, pooling)
        model.name_or_path = name
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits ``[batch, num_labels]`` and, with labels, the mean cross-entropy or squared error."""
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT names what none may take
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        logits = self.classifier(self.dropout(self.pool(states, attention_mask).to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=cast(Any, loss), logits=logits)

    def pool(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``[batch, length, hidden]`` to ``[batch, hidden]``; padding does not count."""
        if self.pooling == "cls":
            return states[:, 0]
        return mean_over(states, attention_mask)


def mean_over(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean of the attended hidden states, ``[batch, length, hidden]`` to ``[batch, hidden]``."""
    if attention_mask is None:
        return states.mean(1)
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
