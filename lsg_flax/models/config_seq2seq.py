"""The configuration of an encoder-decoder: one record for both stacks, from which it makes an
`EncoderConfig` for each."""

import functools
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lsg_flax.checks import Range, require
from lsg_flax.models.activations import activation
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.models.config_json import RATE

_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ModelConfig):
    """The config of an encoder and a decoder that share one word table. Attributes are those of
    transformers' BartConfig.

    Attributes:
        encoder_layers, decoder_layers: number of layers.
        encoder_attention_heads, decoder_attention_heads: number of heads of each layer.
        encoder_ffn_dim, decoder_ffn_dim: features between the projections of a feed-forward layer.
        dropout, attention_dropout, activation_dropout, classifier_dropout: probabilities of
            dropping a feature of a state, an attention weight, a feature inside feed-forward
            layers, and one that the head of sequence classification reads.
        lsg: the attention pattern of the encoder; the decoder's attention is always full.
        encoder_layerdrop, decoder_layerdrop: probability that a layer is skipped during training.
        max_position_embeddings: the largest number of tokens that each stack reads.
        pass_global_tokens_to_decoder: with LSG attention, whether the decoder sees the states of
            the globals too; `pool_with_global` then has no effect.
        is_encoder_decoder, is_decoder: written to config.json for PyTorch. A causal_lm is the
            decoder on its own.

    Raises:
        ValueError: as `ModelConfig`, and for an unknown activation, heads that do not divide
            hidden_size, and special tokens that are not in the table.
    """

    RANGES: ClassVar[dict[str, Range]] = ModelConfig.RANGES | {
        **{
            name.format(side): EncoderConfig.RANGES[of]
            for name, of in (
                ("{}_layers", "num_hidden_layers"),
                ("{}_attention_heads", "num_attention_heads"),
                ("{}_ffn_dim", "intermediate_size"),
            )
            for side in ("encoder", "decoder")
        },
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), RATE),
        **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "classifier_dropout"), RATE),
        "max_position_embeddings": EncoderConfig.RANGES["max_position_embeddings"],
    }

    model_type: str = "bart"
    vocab_size: int = 50265
    hidden_size: int = 1024
    pad_token_id: int | None = 1
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_attention_heads: int = 16
    decoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    classifier_dropout: float = 0.0
    scale_embedding: bool = False
    max_position_embeddings: int = 1024
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = 2
    pass_global_tokens_to_decoder: bool = True
    is_encoder_decoder: bool = True
    is_decoder: bool = False

    def __post_init__(self):
        super().__post_init__()
        activation(self.activation_function, "activation_function")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads, size = getattr(self, name), self.hidden_size
            require(
                size % heads == 0,
                f"{self.dialect.spelled('hidden_size')}={size} is not divisible by {name}={heads}.",
            )
        for name in (*_TOKENS, *_FORCED):
            token = getattr(self, name)
            require(
                token is None or 0 <= token < self.vocab_size,
                f"{name}={token} is outside 0..{self.vocab_size - 1}, the rows of a table of "
                f"vocab_size={self.vocab_size}.",
            )
        assert self.encoder.lsg is self.lsg  # built here, so that its warning points to the caller

    @functools.cached_property
    def encoder(self) -> EncoderConfig:
        """The config of the encoder's stack."""
        return self._stack(
            num_hidden_layers=self.encoder_layers,
            num_attention_heads=self.encoder_attention_heads,
            intermediate_size=self.encoder_ffn_dim,
            lsg=self.lsg,
        )

    @functools.cached_property
    def decoder(self) -> EncoderConfig:
        """The config of the decoder's stack."""
        return self._stack(
            num_hidden_layers=self.decoder_layers,
            num_attention_heads=self.decoder_attention_heads,
            intermediate_size=self.decoder_ffn_dim,
            is_decoder=True,
            add_cross_attention=True,
        )

    def _stack(self, **own: Any) -> EncoderConfig:
        return EncoderConfig(
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            initializer_range=self.initializer_range,
            pad_token_id=self.pad_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
            labels=self.labels,
            hidden_act=self.activation_function,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            classifier_dropout=self.classifier_dropout,
            max_position_embeddings=self.max_position_embeddings,
            **{name: self.dialect.absent[name] for name in ("type_vocab_size", "layer_norm_eps")},
            **own,
        )

    @property
    def stacks(self) -> dict[str, EncoderConfig]:
        """The configs of both stacks, by the first part of their parameters' paths."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def passed_globals(self) -> int:
        """The number of globals that the decoder sees before the encoder's tokens."""
        lsg = self.lsg
        return lsg.num_global_tokens if lsg and self.pass_global_tokens_to_decoder else 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for config.json: LSG fields only with LSG attention, and no null where
        the family's default is None."""
        values = super().to_dict()
        if self.lsg is None:
            del values["pass_global_tokens_to_decoder"]
        usual = {f.name: f.default for f in fields(self)}
        usual |= self.dialect.defaults
        for name in (*_TOKENS, *_FORCED):
            if values[name] is None and usual[name] is None:
                del values[name]
        return values
