"""Reads the rotary positions of a config.json. Start at read_rope and read_ropes_by_type.

A config has one of two schemas: `rope_theta` with `rope_scaling`, or `rope_parameters` of
transformers 5. If it has both, the older `rope_scaling` is read and `rope_parameters` ignored, as
in transformers. In some families `rope_parameters` has a section for each type of layer; there
`rope_scaling` overrides values of full_attention. Defaults are those of transformers.

Words: a section is an object of the config that describes rotary positions; its kind, a key of
ROPES, says how they are scaled; theta is the base of the frequencies, `rope_theta`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from layers.args import Rope
from layers.positions import ROPES
from weights.config import Config

KINDS = [kind for kind in ROPES if kind != "none"]  # a family chooses "none", not a config
KIND_KEYS = "rope_type", "type"  # of a section; "type" is older


def read_rope(
    config: Config,
    head_dim: int,
    theta: float = 10000.0,
    *,
    partial: float | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
    kinds: Sequence[str] = KINDS,
) -> Rope:
    """Returns the rotary positions of a model whose layers share them.

    theta: the family's default base. partial: the family's default of partial_rotary_factor, the
    share of a head's channels that is rotated; None: the family rotates all channels, and a factor
    other than 1 is refused. aliases: further names of kinds in this family's configs -> the kinds.
    kinds: those that the family supports. Raises ValueError for a kind or a value that is not
    supported.
    """
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    section = old if old.values else new
    for key in ("full_attention", "sliding_attention"):
        section.refuse(key, (), "the layers of this family share their rotary positions")
    # theta lies in the section in transformers 5, beside it in the older schema.
    theta = (section if "rope_theta" in section.values else config).number("rope_theta", theta)
    kind = read_kind(section, aliases, kinds)
    rope = Rope(rotated_channels(config, section, head_dim, partial), theta, kind)
    original = config.positions("original_max_position_embeddings", None, null=None)
    return READERS.get(kind, plain)(config, section, rope, original)


def read_ropes_by_type(
    config: Config, head_dim: int, full_theta: float, sliding_theta: float
) -> dict[str, Rope]:
    """Returns the rotary positions of a model with a Rope for each type of layer, full attention
    and sliding window: {"full_attention": Rope, "sliding_attention": Rope}.

    full_theta, sliding_theta: the bases of sections without rope_theta. Raises ValueError as
    read_rope does.
    """
    sections, scaled = config.section("rope_parameters"), config.section("rope_scaling")
    if others := sections.values.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{sections.where}: '{min(others)}' is not supported: this family has a section for "
            "each type of layer, full_attention and sliding_attention"
        )
    if "type" in scaled.values and "rope_type" not in scaled.values:
        raise ValueError(f"{scaled.where}: 'type' is not supported in this family: use 'rope_type'")
    full = sections.section("full_attention")
    full = Config(full.values | scaled.values, full.where)
    return {
        "full_attention": rope_of_type(config, full, head_dim, full_theta),
        "sliding_attention": rope_of_type(
            config, sections.section("sliding_attention"), head_dim, sliding_theta
        ),
    }


def rope_of_type(config: Config, section: Config, head_dim: int, theta: float) -> Rope:
    """Returns the rotary positions that the section of one type of layer describes. theta: the base
    if the section has none."""
    # transformers reads `truncate` beside the sections: false in a section has no effect there.
    section.refuse("truncate", [True], "only true is supported in a section for a type of layer")
    kind = read_kind(section, {}, KINDS)
    theta = section.number("rope_theta", theta)
    rope = Rope(rotated_channels(config, section, head_dim, None), theta, kind)
    return READERS.get(kind, plain)(config, section, rope, None)


def read_kind(section: Config, aliases: Mapping[str, str], kinds: Sequence[str]) -> str:
    """Returns the kind of rotary positions, a key of ROPES: the value of the first of KIND_KEYS
    that the section has, or "default" if it has neither. aliases, kinds: see read_rope."""
    key = next((key for key in KIND_KEYS if key in section.values), KIND_KEYS[0])
    kind = section.choice(key, [*kinds, *aliases], "default")
    return aliases.get(kind, kind)


def rotated_channels(config: Config, section: Config, head_dim: int, partial: float | None) -> int:
    """Returns how many channels of a head are rotated. partial: see read_rope."""
    holder = section if "partial_rotary_factor" in section.values else config
    if partial is None:
        holder.refuse("partial_rotary_factor", [1], "this family rotates all channels")
        return head_dim
    return int(head_dim * holder.number("partial_rotary_factor", partial, maximum=1.0))


# --- a reader for each kind, see READERS


def plain(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns `rope` as it is: the kind has no further values."""
    return rope


def read_linear(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns the rope of linear interpolation, whose only further value is the factor."""
    return replace(rope, factor=section.number("factor", maximum=1e6))


def read_dynamic(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns the rope of the NTK scaling. In this kind the trained context is always
    max_position_embeddings."""
    context = config.positions("max_position_embeddings")
    return replace(rope, factor=section.number("factor", maximum=1e6), original_context=context)


def read_llama3(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns the rope of Llama 3.1's scaling. Raises ValueError if low_freq_factor is not less
    than high_freq_factor."""
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"{section.where}: 'low_freq_factor' is {low:g} and must be less than "
            f"'high_freq_factor', {high:g}"
        )
    return replace(
        read_linear(config, section, rope, original),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=trained_context(config, section, original),
    )


def read_yarn(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns the rope of yarn. A factor of null is the quotient of max_position_embeddings and the
    trained context. Zero or null for a beta or mscale means its default, as in transformers. Raises
    ValueError for a base of 1 or less, which gives no frequencies below 1."""
    if rope.theta <= 1:
        raise ValueError(f"{section.where}: 'rope_theta' is {rope.theta:g} and must be above 1")
    context = trained_context(config, section, original)
    factor = section.number("factor", null=None, maximum=1e6)
    factor = factor or config.positions("max_position_embeddings") / context
    # Without the zeros, so that a zero counts as missing.
    given = Config({k: v for k, v in section.values.items() if v != 0}, section.where)
    fast, slow = given.number("beta_fast", 32, null=32), given.number("beta_slow", 1, null=1)
    mscales = [given.number(key, 0, null=0) for key in ("mscale", "mscale_all_dim")]
    # The paper's 0.1 log(factor) + 1 or, with both mscales, the quotient of two such terms
    # (DeepSeek). max: a factor below 1 changes nothing.
    numerator, denominator = mscales if all(mscales) else (1, 0)
    scale = 0.1 * math.log(max(factor, 1))
    default = (numerator * scale + 1) / (denominator * scale + 1)
    return replace(
        rope,
        factor=factor,
        original_context=context,
        attention_factor=section.number("attention_factor", default, null=default),
        beta_fast=fast,
        beta_slow=slow,
        truncate=section.flag("truncate", True),
    )


def read_longrope(config: Config, section: Config, rope: Rope, original: int | None) -> Rope:
    """Returns the rope of longrope. Without a factor it is the quotient of max_position_embeddings
    and the trained context. Raises ValueError for a trained context of 1."""
    context = trained_context(config, section, original)
    longest = config.positions("max_position_embeddings")
    if context == 1:  # its logarithm, a divisor, would be 0
        key = "original_max_position_embeddings"
        raise ValueError(f"{section.where}: '{key}' is 1 and must be more")
    factor = section.number("factor", None, null=None) or longest / context
    default = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return replace(
        rope,
        factor=factor,
        original_context=context,
        attention_factor=section.number("attention_factor", default, null=default),
        short_factors=section.numbers("short_factor", rope.dim // 2),
        long_factors=section.numbers("long_factor", rope.dim // 2),
    )


def trained_context(config: Config, section: Config, original: int | None) -> int:
    """Returns the trained context: the positions that the model was trained with before scaling.

    It is `original` or, if that is None, original_max_position_embeddings of the section or, if the
    section has none, max_position_embeddings. original: see READERS.
    """
    longest = config.positions("max_position_embeddings")
    return original or section.positions("original_max_position_embeddings", longest)


# Kind -> its reader, which returns the whole Rope; `plain` for kinds that are not listed. It takes
# the config, the section, a Rope with dim, theta and kind, and `original`: the value of
# original_max_position_embeddings beside the section, or None.
READERS = {
    "linear": read_linear,
    "dynamic": read_dynamic,
    "llama3": read_llama3,
    "yarn": read_yarn,
    "longrope": read_longrope,
}
