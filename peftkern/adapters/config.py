"""``LoRAConfig``: the settings of an adapter and PEFT's ``adapter_config.json``; it knows nothing of modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What is read nowhere and changes nothing that a loaded layer computes. Any other key that is set is refused.
_NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version megatron_config megatron_core "
    "qalora_group_size layers_pattern layers_to_transform loftq_config corda_config eva_config lora_ga_config "
    "ensure_weight_tying runtime_config".split()
)
# Initialisations that leave the base as it is, and those that subtract the same product from it at every load.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_RESIDUAL_INITS = ("pissa", "olora")


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of one adapter, under PEFT's names.

    Args:
        r, lora_alpha: rank and numerator of the scaling, where no pattern says otherwise.
        target_modules: name suffixes, a regex that matches a whole name, or "all-linear"; empty where none are known.
        exclude_modules: suffixes or a regex, as target_modules.
        lora_dropout, lora_bias, use_rslora, init_lora_weights: as in ``LoRALinear``.
        bias: "none", or "lora_only" where the base biases of adapted layers are trained.
        rank_pattern, alpha_pattern: rank and lora_alpha by a regex that matches the end of a name at a dot.
        fan_in_fan_out: whether the base layers store [K, N], as GPT-2's Conv1D.
    Raises: ValueError or TypeError naming the field.
    """

    r: int
    lora_alpha: float
    target_modules: Sequence[str] | str = ()
    exclude_modules: Sequence[str] | str = ()
    lora_dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability")
        if self.bias not in ("none", "lora_only"):
            raise ValueError(f"bias={self.bias!r} is not 'none' or 'lora_only', the biases of the adapted layers")
        for name in ("lora_bias", "use_rslora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is a bool, not {getattr(self, name)!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not isinstance(value, str):
                if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
                    raise TypeError(f"{name} is a string or a list of strings, not {value!r}")
                object.__setattr__(
                    self, name, tuple(value) if isinstance(value, (list, tuple)) else tuple(sorted(value))
                )
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} is a dict, not {patterns!r}")
            for pattern, value in patterns.items():
                check(f"{name}[{pattern!r}]", value)
                compiled(name, pattern)

    def rank(self, name: str) -> int:
        """The rank of the layer of that name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """lora_alpha of the layer of that name."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """The number that multiplies the update of the layer of that name."""
        r = self.rank(name)
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)

    def to_json(self, **extra: Any) -> str:
        """The text of ``adapter_config.json``; ``extra`` are keys that say nothing about layers (task_type, ...)."""
        keys = {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "revision": None,
            "inference_mode": True, "r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout,
            "target_modules": _listed(self.target_modules), "exclude_modules": _listed(self.exclude_modules) or None,
            "bias": self.bias, "lora_bias": self.lora_bias, "use_rslora": self.use_rslora, "use_dora": False,
            "rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern),
            "init_lora_weights": self.init_lora_weights, "fan_in_fan_out": self.fan_in_fan_out, "modules_to_save": None,
        }  # fmt: skip
        return json.dumps(keys | extra, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> LoRAConfig:
        """Read the text of ``adapter_config.json``.

        Raises: ValueError or TypeError naming the key; NotImplementedError for what changes the layer (DoRA, ...).
        Patterns of a file are run only where they cannot take exponential time.
        """
        try:
            keys = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(keys, dict):
            raise ValueError(f"not a JSON object but a {type(keys).__name__}")
        if keys.get("peft_type") != "LORA":
            raise NotImplementedError(f"peft_type={keys.get('peft_type')!r} is not 'LORA'")
        own = {name: keys[name] for name in cls.__dataclass_fields__ if keys.get(name) is not None}
        for name, value in keys.items():
            if value and name not in own and name not in _NEUTRAL and name != "peft_type":
                raise NotImplementedError(f"{name}={value!r} is not supported: the adapter is more than plain LoRA")
        own = {"r": 8, "lora_alpha": 8} | own  # PEFT's defaults
        if keys.get("layers_to_transform") is not None:
            own.pop("target_modules", None)  # more than a name decides
        init = own.get("init_lora_weights", True)
        if init not in _PLAIN_INITS and init not in _RESIDUAL_INITS:
            raise NotImplementedError(
                f"init_lora_weights={init!r} changes the base in a way that cannot be repeated: save the adapter "
                "as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if isinstance(own.get(name), dict):
                for pattern in own[name]:
                    _refuse_slow(name, pattern)
        return cls(**own)


def matches(rule: Sequence[str] | str, name: str) -> bool:
    """A regex matches the whole name; an entry of a list is the name or its end after a dot."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in rule)


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return (", ".join(names[:8]) or "none") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is a number, not {value!r}")
    if not abs(value) < 2.0**1023 or math.isnan(value):
        raise ValueError(f"{name} is finite, got {value}")


def compiled(name: str, pattern: str) -> re.Pattern[str]:
    """A pattern of the field ``name``, which matches the end of a layer's name at a dot. Raises: ValueError."""
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


def _refuse_slow(name: str, pattern: str) -> None:
    """A repeated group, or many repetitions or alternatives, can run for years on a name of forty letters."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "c", pattern)
    repetitions = len(re.findall(r"[*+{]|(?<!\()\?", plain))
    repeated_group = re.search(r"\)[*+?{]", plain)
    if len(pattern) > 1000 or repeated_group or repetitions > 3 or plain.count("|") > 16:
        raise ValueError(f"{name}: the pattern {pattern[:80]!r} is too complex to be run from a file; name the layers")


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the name's end, as PEFT."""
    for pattern, value in patterns.items():
        if compiled("pattern", pattern).match(name):
            return value
    return default


def _listed(names: Sequence[str] | str) -> list[str] | str:
    return names if isinstance(names, str) else list(names)
