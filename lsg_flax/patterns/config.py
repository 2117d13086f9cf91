"""The LSG attention pattern as a frozen, validated, hashable record (static under `jax.jit`).

Field names and defaults are those of the LSG reference. Nothing is silently corrected: an invalid
value raises with the value, what is allowed, and what to do.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from lsg_flax.checks import Range, check_fields, require, whole

SparsityType = Literal["none", "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling"]
SPARSITY_TYPES: tuple[str, ...] = get_args(SparsityType)
MAX_GLOBAL_TOKENS = 512  # rows of the reference's global embedding table
_RANGES = {
    "block_size": whole(1, 2**20),
    "sparse_block_size": Range(0, 2**20, "must be 0 (off) or positive, at most 1,048,576"),
    "lsh_num_pre_rounds": Range(0, 100, "must be 0 or positive, at most 100"),
    "num_global_tokens": Range(
        1,
        MAX_GLOBAL_TOKENS,
        f"is outside 1..{MAX_GLOBAL_TOKENS}, the rows of the global embedding table",
    ),
}


@dataclass(frozen=True)
class LSGConfig:
    """The attention pattern: local blocks, sparse representatives, global tokens (arXiv 2210.15497,
    section 3; fields but `strict_reference` and defaults are those of lsg_converter's
    LSGBertConfig).

    Every query block of `block_size` tokens attends to its own block and both neighbours, to
    `sparse_block_size` sparse representatives on either side of those, and to the global tokens.
    One representative stands for `sparsity_factor` tokens.

    Attributes:
        block_size: tokens per block.
        sparse_block_size: representatives on each side; 0 switches the sparse part off. Must exceed
            3/4 of `block_size / sparsity_factor`: below that the reference's windows silently fall
            inside the local window.
        sparsity_factor: tokens per representative, dividing `block_size`; 0 or less switches the
            sparse part off.
        sparsity_type: how representatives are chosen; None is accepted for "none".
        num_global_tokens: learned tokens in front of the sequence, 1..512.
        lsh_num_pre_rounds: hashing rounds before the last one, for "lsh".
        adaptive: whether any length is padded to whole blocks; otherwise lengths over two blocks
            must be multiples of `block_size`.
        pool_with_global: whether the first token's final state is replaced by that of the first
            global token.
        mask_first_token: whether token 0 is hidden from every query (needs `pool_with_global`).
        strict_reference: whether to reproduce the reference's padding leak in "bos_pooling" (and in
            the standalone "pooling") bit for bit.

    Raises:
        ValueError: for a setting that the reference would crash on or silently change.
    """

    adaptive: bool = True
    block_size: int = 128
    lsh_num_pre_rounds: int = 1
    mask_first_token: bool = False
    num_global_tokens: int = 1
    pool_with_global: bool = True
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: SparsityType = "norm"
    strict_reference: bool = False

    def __post_init__(self):
        if self.sparsity_type is None:
            object.__setattr__(self, "sparsity_type", "none")
        check_fields(self, _RANGES)
        require(
            self.pool_with_global or not self.mask_first_token,
            "mask_first_token=True hides the first token, so its state must come from a global: "
            "set pool_with_global=True.",
        )
        require(
            self.sparsity_factor <= 0 or self.block_size % self.sparsity_factor == 0,
            f"block_size={self.block_size} is not divisible by "
            f"sparsity_factor={self.sparsity_factor}; {self._factor_remedy()}",
        )  # also without a sparse part: PyTorch's classes require it
        if self.is_sparse:
            self._validate_sparse()

    def _factor_remedy(self) -> str:
        block = self.block_size
        fitting = [d for d in range(1, block + 1) if block % d == 0 and (block // d) % 2 == 0]
        return (
            f"for block_size={block} choose sparsity_factor from {[*fitting, block]}, "
            "or 0 for no sparse part."
        )

    def _validate_sparse(self) -> None:
        block, sparse, factor = self.block_size, self.sparse_block_size, self.sparsity_factor
        step = block // factor
        require(
            step == 1 or step % 2 == 0,
            f"block_size/sparsity_factor = {block}/{factor} = {step} is odd, and the sparse "
            f"windows need it even (or 1); {self._factor_remedy()}",
        )
        require(
            4 * sparse > 3 * step,
            f"sparse_block_size={sparse} must be greater than 3/4 of block_size/sparsity_factor = "
            f"{step}, i.e. at least "
            f"{3 * step // 4 + 1}: smaller windows fall inside the local window. Use "
            f"sparse_block_size={block}, or 0 for none.",
        )
        if self.sparsity_type in ("norm", "lsh") and factor > 1:
            chunk = self.selection_chunk
            require(
                chunk % factor == 0,
                f"sparsity_type={self.sparsity_type!r} picks from chunks of min(block_size, "
                f"sparse_block_size) = {chunk} tokens, "
                f"which sparsity_factor={factor} must divide; use sparse_block_size={block}.",
            )
        if self.sparsity_type == "lsh" and factor != sparse:
            require(
                self.selection_chunk // factor >= 2,
                "sparsity_type='lsh' needs at least two buckets per chunk, but min(block_size, "
                "sparse_block_size)/sparsity_factor = "
                f"{self.selection_chunk}/{factor}; lower sparsity_factor.",
            )

    @property
    def is_sparse(self) -> bool:
        """Whether there is a sparse part at all."""
        return (
            self.sparsity_type != "none" and self.sparsity_factor > 0 and self.sparse_block_size > 0
        )

    @property
    def sparse_step(self) -> int:
        """Representatives per block."""
        return self.block_size // self.sparsity_factor

    @property
    def selection_chunk(self) -> int:
        """Tokens per chunk from which "norm" and "lsh" pick."""
        return min(self.block_size, self.sparse_block_size)

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """Returns how many padding tokens to append so that there are whole blocks; 0 up to two
        blocks, where attention is full.

        Args:
            length: number of tokens, without prepended globals.
            shards: number of devices that the tokens are sharded over; each gets the same number of
                blocks.

        Raises:
            ValueError: if the length needs padding and `adaptive` is off, or if a shard would have
                fewer blocks than its neighbours need to see.
        """
        if shards == 1 and length <= 2 * self.block_size:
            return 0
        unit = shards * self.block_size
        extra = -length % unit
        if shards > 1:
            self._check_shards(length, shards, (length + extra) // unit)
        require(
            self.adaptive or not extra,
            f"length {length} is over two blocks and not a multiple of "
            f"{'' if shards == 1 else f'{shards} shards x '}block_size={self.block_size}, and "
            f"adaptive=False: pad the inputs to {length + extra} or set adaptive=True.",
        )
        return extra

    def _check_shards(self, length: int, shards: int, blocks: int) -> None:
        needed = max(3, -(-self.sparse_halo // self.sparse_step) if self.is_sparse else 0)
        require(
            blocks >= needed,
            f"{length} tokens over sequence={shards} devices give each {blocks} blocks of "
            f"{self.block_size}, fewer than the {needed} that its neighbours look into; use at "
            f"most sequence={max(length // (needed * self.block_size), 1)}, or texts of more than "
            f"{shards * (needed - 1) * self.block_size} tokens.",
        )
        require(
            not self.strict_reference,
            "strict_reference=True reproduces numbers that depend on the padding of the whole "
            f"text, which sequence={shards} shards do not see; use sequence=1.",
        )

    @property
    def sparse_halo(self) -> int:
        """How many representatives before, and after, a run of blocks its queries see."""
        return self.sparse_step + self.sparse_block_size
