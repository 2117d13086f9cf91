"""The configuration of local-attention's transformer: its constructor's keywords, renamed where
other models have the same setting."""

import functools
import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from lsg_flax.checks import Range, require, whole
from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.config_json import ABSENT, RATE, Dialect
from lsg_flax.patterns import Local, rotary_of

_Own = TypeVar("_Own", bound="LocalTransformerConfig")
_POSITIVE = Range(2.0**-20, 2.0**20, "must be positive, at most 1,048,576")
NEEDED = ("num_tokens", "max_seq_len", "dim", "depth")
# Fields that config.json may have beside the constructor's keywords; all others are refused.
_BESIDE = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "mask_token_id", "generation_config"),
}


@dataclass(frozen=True, kw_only=True)
class LocalTransformerConfig(EncoderConfig):
    """The config of lucidrains' LocalTransformer. Attributes are the keywords of LocalTransformer
    and LocalMHA. Settings that all models have are named as in other configs; config.json keeps the
    original names (`dim`, `depth`, `heads`, `num_tokens`, `max_seq_len`, `attn_dropout`).

    Attributes:
        vocab_size: number of tokens in the table; 0 for `num_tokens=None`: the model reads
            embeddings and returns states.
        local_attn_window_size: tokens per window.
        dim_head: features of one attention head.
        ff_mult: 3 / 2 of the features inside a feed-forward layer, as a multiple of hidden_size.
        ff_dropout: probability of dropping a feature in it.
        xpos_scale_base: in tokens, see `lsg_flax.local_attention`.
        num_residual_streams: number of residual streams (hyper-connections).
        qk_scale: factor of the scores with qk_rmsnorm.
        exact_windowsize: None means True.
        look_backward, look_forward: number of windows before and after its own that a token sees;
            look_forward=None means 0 for a causal model, else 1.
        ignore_index: a label that the loss ignores, beside -100.
        layers_insert_global_attn: numbers, from 1 on, of the layers that have a global attention
            layer in front; None or () for none.

    Raises:
        ValueError: as `EncoderConfig`, and for LSG attention, unknown fields of config.json, a
            window that is larger than max_seq_len, options of windows that contradict each other,
            and numbers of layers that do not exist.
    """

    RANGES: ClassVar[dict[str, Range]] = EncoderConfig.RANGES | {
        "vocab_size": whole(0, 2**28),
        "dim_head": whole(1, 2**16),
        "num_residual_streams": whole(1, 1024),
        "ff_dropout": RATE,
        **dict.fromkeys(("ff_mult", "qk_scale", "xpos_scale_base"), _POSITIVE),
    }
    SHARES: ClassVar[tuple[tuple[str, str], ...]] = ()  # heads have a width of their own
    LENGTHENS: ClassVar[bool] = False

    model_type: str = "local-transformer"
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_attention_heads: int = 8
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-5
    is_decoder: bool = True
    causal: bool = True
    local_attn_window_size: int = 512
    dim_head: int = 64
    ff_mult: float = 4.0
    ff_dropout: float = 0.0
    ignore_index: int = -1
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    use_dynamic_pos_bias: bool = False
    num_residual_streams: int = 4
    qk_rmsnorm: bool = False
    qk_scale: float = 8.0
    exact_windowsize: bool | None = None
    gate_values_per_head: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    shared_qk: bool = False
    layers_insert_global_attn: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.lsg is None, "lsg: a local-transformer has no LSG attention; leave it out.")
        unknown = sorted(json.loads(self.extra).keys() - _BESIDE)
        require(
            not unknown,
            f"{', '.join(unknown)} in config.json: local-transformer has no such keywords, or they "
            "change the computation and are not supported; remove them. A `global_attn_layer` is "
            "passed to from_pretrained(..., global_attention=module) instead.",
        )
        depth = self.num_hidden_layers
        require(
            all(1 <= number <= depth for number in self.global_layers),
            f"layers_insert_global_attn={list(self.global_layers)} must be layer numbers from 1 to "
            f"depth={depth}.",
        )
        window, limit = self.local_attn_window_size, self.max_position_embeddings
        assert self.pattern.window_size == window  # built here, so that its fields are checked
        require(
            not self.vocab_size or window <= limit,
            f"local_attn_window_size={window} is larger than max_seq_len={limit}, so one window "
            f"would see all positions: give a window of at most {limit}.",
        )
        require(
            not self.use_dynamic_pos_bias or self.hidden_size > 1,
            "use_dynamic_pos_bias=True computes with dim // 2 features, which is 0 for dim=1: give "
            "a dim of at least 2.",
        )

    @functools.cached_property
    def pattern(self) -> Local:
        """The attention pattern of the layers."""
        xpos, forward = self.use_xpos and not self.use_dynamic_pos_bias, self.look_forward
        return Local(
            self.local_attn_window_size,
            self.causal,
            self.look_backward,
            (0 if self.causal else 1) if forward is None else forward,
            self.exact_windowsize is not False,
            self.shared_qk,
            self.qk_scale if self.qk_rmsnorm else None,
            rotary_of(
                self.dim_head,
                self.local_attn_window_size,
                used=not self.use_dynamic_pos_bias,
                xpos=xpos,
                base=self.xpos_scale_base if xpos else None,
            ),
        )

    @property
    def global_layers(self) -> tuple[int, ...]:
        """Sorted numbers, from 1 on, of the layers that have a global attention layer in front."""
        return tuple(sorted({*(self.layers_insert_global_attn or ())}))

    def with_global_layers(self: _Own) -> _Own:
        """Returns a copy with global attention in front of every layer, unless
        `layers_insert_global_attn` is set."""
        named = self.layers_insert_global_attn
        every = tuple(range(1, self.num_hidden_layers + 1))
        return replace(self, layers_insert_global_attn=every if named is None else named)

    def layers_of(self, path: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """As of other configs; for global attention layers only those that exist."""
        if "/global_layers/" not in path:
            return super().layers_of(path)
        return {(place,): (number - 1,) for place, number in enumerate(self.global_layers)}

    @property
    def kept_pattern(self) -> Local:
        """The pattern that decides how many slots a cache has."""
        return self.pattern

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim_head

    @property
    def mlp_width(self) -> int:
        """The number of features between the two projections of a feed-forward layer."""
        return int(self.hidden_size * self.ff_mult * 2 / 3)

    @property
    def usual_task(self) -> str:
        """ "causal_lm" if there is a token table, else "base"."""
        return "causal_lm" if self.vocab_size else "base"

    @property
    def attention(self) -> str:
        """The kind of attention, in a word."""
        return "local"

    @property
    def ignored_label(self) -> int:
        """The token label that the loss ignores, beside -100."""
        return self.ignore_index

    def cuts_last_token(self, length: int) -> bool:
        """As in PyTorch's `return_loss`, but only where it matters: if tokens see later ones, or
        the last of `length` tokens has no position."""
        read = self.max_position_embeddings
        return length == read + 1 or (not self.causal and length <= read)

    @property
    def lacks(self) -> tuple[str, ...]:
        """Parts of the paths of parameters that a model with these settings does not have."""
        parts = {
            "embeddings": bool(self.vocab_size),
            "streams": self.num_residual_streams > 1,
            "global_layers": bool(self.global_layers),
            "scale_of": self.qk_rmsnorm,
            "gate": self.gate_values_per_head,
            "inv_freq": self.pattern.rotary is not None,
            "position_bias": self.use_dynamic_pos_bias,
        }
        return tuple(part for part, there in parts.items() if not there)

    @classmethod
    def from_dict(cls: type[_Own], values: dict[str, Any]) -> _Own:
        """Makes a config from the fields of config.json; raises ValueError as other configs do, and
        for missing keywords."""
        missing = [name for name in NEEDED if name not in values]
        require(
            not missing and values["num_tokens"] != 0,
            f"config.json of a local-transformer must have {', '.join(NEEDED)} (num_tokens is null "
            f"for a model that reads embeddings); missing are {missing}, num_tokens="
            f"{values.get('num_tokens')!r}.",
        )
        read: dict[str, Any] = {"num_tokens": values["num_tokens"] or 0}
        if isinstance(layers := values.get("layers_insert_global_attn"), list):
            read["layers_insert_global_attn"] = tuple(layers)
        return super().from_dict(values | read)

    def to_dict(self) -> dict[str, Any]:
        """Returns the constructor's keywords, and other fields that differ from their defaults."""
        values, usual = super().to_dict(), super(LocalTransformerConfig, type(self)()).to_dict()
        own = {*KEYWORDS, "model_type"}
        kept = {n: v for n, v in values.items() if n in own or usual.get(n, _BESIDE) != v}
        return kept | {"num_tokens": self.vocab_size or None}


DIALECT = Dialect(
    names={
        "vocab_size": "num_tokens",
        "max_position_embeddings": "max_seq_len",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "attention_probs_dropout_prob": "attn_dropout",
    },
    absent=ABSENT
    | {
        "is_decoder": True,
        "add_cross_attention": False,
        "tie_word_embeddings": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "classifier_dropout": None,
        "intermediate_size": EncoderConfig.intermediate_size,  # see `mlp_width`
    },
)
KEYWORDS = (
    *DIALECT.names.values(),
    *(
        name
        for name in LocalTransformerConfig.__annotations__
        if name not in {*DIALECT.names, *DIALECT.absent, "RANGES", "SHARES", "pad_token_id"}
    ),
)
