"""Reading Hugging Face `config.json` dicts: every key is read, known not to matter, or named in a warning."""

import logging
import math
from typing import Any, NoReturn

from functional_trainer.errors import brief
from models.layers import Rope

log = logging.getLogger(__name__)

# Keys that do not change what a causal language model computes in training.
HARMLESS = {
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "return_dict",
    "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


LAYERS = EXPERTS = 10_000  # more is a mistake, and would be built before weights are looked for


class Reader:
    """A config dict that remembers which keys were read."""

    def __init__(self, hf: dict[str, Any]):
        self.hf, self.seen = hf, set(HARMLESS)
        self.family = hf.get("model_type", "?")

    def __call__(self, key: str, default: Any = None, *, expect: type | tuple[type, ...] | None = None) -> Any:
        """Return `hf[key]`, or the default where it is missing or null."""
        self.seen.add(key)
        value = self.hf.get(key)
        if value is None:
            return default
        wanted = expect or (type(default) if default is not None else None)
        wanted = (int, float) if wanted is float else wanted
        if wanted and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
            self.wrong(key, value, str(wanted))
        return value

    def wrong(self, key: str, value: Any, right: str) -> NoReturn:
        """Raise the ValueError that says so."""
        raise ValueError(f"config.json of {self.family}: {key} is {brief(repr(value), 80)}, expected {right}")

    def size(self, key: str, default: int, most: int = 2**31 - 1) -> int:
        """Return an integer from 1 to `most`."""
        value = self(key, default)
        if not 1 <= value <= most:
            self.wrong(key, value, f"at least 1 and at most {most}")
        return value

    def number(self, key: str, default: float, above: float | None = None, of: dict | None = None) -> float:
        """Return a finite number of the config, or of a dict in it: at least 0, or more than `above`."""
        self.seen.add(key)
        value = (self.hf if of is None else of).get(key)
        value = default if value is None else value
        least = 0 if above is None else above
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 1e300
        if not fits or value == above:
            self.wrong(key, value, "a number of at least 0" if above is None else f"a number above {above}")
        return float(value)

    def only(self, key: str, allowed: Any, why: str) -> None:
        """Refuse any value but `allowed` (or null)."""
        value = self(key, allowed)
        if value != allowed:
            shown = brief(repr(value), 80)
            raise ValueError(f"config.json of {self.family}: {key} = {shown} is not supported ({why}); use {allowed!r}")

    def window(self) -> int | None:
        """Return the sliding window, None where it is off; an absent key means 4096 and a null one none."""
        on = self("use_sliding_window", False)
        width = self("sliding_window", expect=int) if "sliding_window" in self.hf else 4096
        return self.size("sliding_window", 4096) if on and width is not None else None

    def rope(self, default_theta: float = 1e4) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
        given = self("rope_scaling", {}) or self("rope_parameters", {})
        self.seen |= {"rope_scaling", "rope_parameters", "original_max_position_embeddings"}
        theta = self.number("rope_theta", self.number("rope_theta", default_theta, above=1), above=1, of=given)
        kind = given.get("rope_type") or given.get("type") or "default"
        used = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        longest = self.size("max_position_embeddings", 32768)
        if any(isinstance(v, dict) for v in given.values()) or kind not in ("default", "linear", "yarn"):
            why = f"rope {brief(given)} is not supported; default, linear and yarn are"
            raise ValueError(f"config.json of {self.family}: {why}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"config.json of {self.family}: partial_rotary_factor must be 1 for this family")
        if kind == "default":
            rope = Rope(theta)
        elif kind == "linear":
            rope, used = Rope(theta, kind, self.number("factor", 1.0, above=0, of=given)), used | {"factor"}
        else:
            rope = self._yarn(theta, given, longest)
            used |= {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
            used |= {"original_max_position_embeddings"}
        self._warn({f"rope.{k}" for k in given if k not in used})
        return rope

    def _yarn(self, theta: float, given: dict, longest: int) -> Rope:
        key = "original_max_position_embeddings"
        trained = int(self.number(key, self.number(key, longest, above=0, of=given), above=0))
        factor = self.number("factor", longest / trained, above=0, of=given)

        def mscale(m: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        m, m_all = (self.number(name, 0, of=given) for name in ("mscale", "mscale_all_dim"))
        scale = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)
        scale = self.number("attention_factor", scale, above=0, of=given)
        fast, slow = (
            self.number(name, usual, above=0, of=given) for name, usual in (("beta_fast", 32), ("beta_slow", 1))
        )
        truncate = given.get("truncate", True)
        if not isinstance(truncate, bool):
            self.wrong("truncate", truncate, "true or false")
        return Rope(theta, "yarn", factor, trained, fast, slow, truncate, scale)

    def done(self) -> None:
        """Name the keys that nobody read."""
        self._warn(set(self.hf) - self.seen)

    def _warn(self, keys: set[str]) -> None:
        if keys:
            log.warning("config.json of %s: these keys are unknown here and kept, not used: %s",
                        self.family, ", ".join(sorted(keys)))  # fmt: skip
