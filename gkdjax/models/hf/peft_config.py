"""adapter_config.json of a PEFT LoRA directory, read and written without peft."""

import dataclasses
import json
import math
import pathlib
import re
import sys
from collections import Counter

from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.lora import Adapter
from gkdjax.utils import files
from gkdjax.utils.errors import UserError

NAME = "adapter_config.json"

# Fields that are read below, and fields that do not change what a module computes from its two
# matrices. Any other one that is set is refused, also one that a later PEFT invents.
_READ = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "bias"),
}
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights
}
# What PEFT takes where the file does not say; also its targets for all families here.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
_DEFAULT_TARGETS = ["q_proj", "v_proj"]
# The other ways to begin change the base's weights too: the adapter alone is not what was trained.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says of its tensors.

    Attributes:
      path: of the file, for errors.
      base: name of the model that the adapter was trained on, or None.
      rank: r, where no pattern of `rank_pattern` says another one; `alpha` likewise.
      rslora: the scale is alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), not alpha / r.
      targets: ends of module names, or a regular expression of whole names.
      excluded: of the same forms, or None.
      layers: numbers of the layers that are targets where `targets` is a list; None: all.
      layers_patterns: names of the list of layers, as regular expressions; empty: any.
    """

    path: pathlib.Path
    base: str | None
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: list[str] | str
    excluded: list[str] | str | None
    layers: list[int] | None
    layers_patterns: list[str]

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on A B of an adapter of this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha with which alpha / rank is the scale."""
        return self.scale(self.rank, self.alpha) * self.rank if self.rslora else self.alpha

    def rank_and_scale(self, modules: list[str]) -> tuple[int, float]:
        """Of modules that are one stacked kernel here.

        Raises:
          UserError: the patterns give them different ones.
        """
        rank = self._one("rank_pattern", self.rank, modules)
        return rank, self.scale(rank, self._one("alpha_pattern", self.alpha, modules))

    def is_target(self, module: str) -> bool:
        """PEFT's rule.

        Raises:
          UserError: target_modules or exclude_modules is no regular expression.
        """
        try:
            if _matches(self.excluded, module) or not _matches(self.targets, module):
                return False
            return self.layers is None or self._layer(module) in self.layers
        except re.error as error:
            raise UserError(f"{self.path}: no regular expression of modules: {error}") from None

    def _layer(self, module: str) -> int | None:
        """The number after the list of layers in a module's name."""
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns]
        for start in starts or [r".*?\.[^.]*"]:
            found = re.match(rf"{start}\.(\d+)\.", module)
            if found:
                return int(found[found.re.groups])
        return None

    def _one(self, field: str, general: float, modules: list[str]):
        pattern = getattr(self, field)
        try:
            values = {_of_pattern(pattern, module, general) for module in modules}
        except re.error as error:
            raise UserError(f"{self.path}: {field} = {pattern!r}: {error}") from None
        if len(values) > 1:
            raise UserError(
                f"{self.path}: {field} = {pattern!r} gives layers of"
                f" {modules[0].rpartition('.')[2]} different values, {sorted(values)}; the layers"
                " of a kernel are one stacked array here and need one"
            )
        return values.pop()


def _matches(rule: list[str] | str | None, module: str) -> bool:
    if isinstance(rule, str):
        return rule == "all-linear" or re.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule or ())


def _of_pattern(pattern: dict, module: str, general: float) -> float:
    """The first key that is a regular expression of the name's end, as PEFT has it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return general


def read(directory: pathlib.Path) -> PeftConfig:
    """Reads and checks adapter_config.json.

    Raises:
      UserError: it is missing or damaged, or the adapter is more than plain LoRA; the field named.
    """
    path = directory / NAME
    if not path.is_file():
        raise UserError(f"{directory} holds no {NAME}, so it is not a PEFT adapter directory")
    fields = files.read_object(path)
    if "peft_type" not in fields and fields.keys() & {"lora_parameters", "fine_tune_type"}:
        raise UserError(
            f"{path} is of an MLX adapter, not of PEFT's: its matrices have other names and forms;"
            " fuse it into a base that is not quantised with mlx_lm.fuse, and name the fused model"
            " as the model"
        )
    _refuse_more_than_lora(path, fields)
    fields = _DEFAULTS | fields
    _check_numbers(path, fields)
    targets = _modules(path, fields, "target_modules")
    targets = _DEFAULT_TARGETS if targets is None else targets
    patterns = _modules(path, fields, "layers_pattern") or []
    return PeftConfig(
        path=path,
        base=fields.get("base_model_name_or_path"),
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=float(fields["lora_dropout"]),
        rslora=bool(fields.get("use_rslora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        targets=targets,
        excluded=_modules(path, fields, "exclude_modules"),
        layers=None if isinstance(targets, str) else _layers(path, fields),
        layers_patterns=[patterns] if isinstance(patterns, str) else patterns,
    )


def _layers(path: pathlib.Path, fields: dict) -> list[int] | None:
    value = fields.get("layers_to_transform")
    numbers = value if isinstance(value, list) else [value]
    if value is None or value == []:
        return None
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise UserError(f"{path}: layers_to_transform = {value!r} must be numbers of layers")
    return numbers


def _modules(path: pathlib.Path, fields: dict, key: str) -> list[str] | str | None:
    value = fields.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} = {value!r} must be names or a regular expression")
    return value


def _refuse_more_than_lora(path: pathlib.Path, fields: dict) -> None:
    refused = [key for key in fields if key not in _READ | _WITHOUT_EFFECT and fields[key]]
    plain = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": _INITS}
    refused += [key for key, allowed in plain.items() if fields.get(key) not in allowed]
    for key in refused:
        raise UserError(
            f"{path}: {key} = {fields.get(key)!r} is not supported, only plain LoRA is; train"
            " without it, or let peft's merge_and_unload() merge the adapter into its base and"
            " name the merged model instead"
        )


def _check_numbers(path: pathlib.Path, fields: dict) -> None:
    patterns = {key: fields.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise UserError(f"{path}: {key} = {pattern!r} must be an object")
    for rank in (fields.get("r"), *patterns["rank_pattern"].values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2**31:
            raise UserError(f"{path}: a rank of {rank!r} must be a whole number above 0")
    for alpha in (fields.get("lora_alpha"), *patterns["alpha_pattern"].values()):
        if not _is_number(alpha):
            raise UserError(f"{path}: an alpha of {alpha!r} must be a number")
    dropout = fields.get("lora_dropout")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout = {dropout!r} must be a number in [0, 1)")


def _is_number(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def write(
    directory: pathlib.Path, adapters: dict[str, Adapter], layout: CheckpointNames, base: str
) -> None:
    """Writes adapter_config.json for adapters of one dropout.

    Args:
      directory: there already.
      adapters: by path, as "layers/q_proj".
      layout: with the names that the base's modules have in torch.
      base: name of the base, a hub id or a path.
    """
    kernels = {path.removeprefix("layers/"): adapter for path, adapter in adapters.items()}
    ranks = {name: adapter.a.shape[-1] for name, adapter in kernels.items()}
    alphas = {name: _alpha(adapter) for name, adapter in kernels.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    (dropout,) = {adapter.dropout for adapter in adapters.values()}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "lora_dropout": dropout,
        "target_modules": _target_modules(sorted(kernels), layout),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (directory / NAME).write_text(json.dumps(fields, indent=2) + "\n")


def _alpha(adapter: Adapter) -> float:
    """alpha / rank is the scale, to the bit where a short number can say it."""
    rank = adapter.a.shape[-1]
    short = round(adapter.scale * rank, 6)
    return short if short / rank == adapter.scale else adapter.scale * rank


def _target_modules(kernels: list[str], layout: CheckpointNames) -> list[str] | str:
    """Names alone would hit the q_proj of a multimodal model's image encoder too."""
    if not layout.foreign:
        return kernels
    return rf".*\blanguage_model\..*\.({'|'.join(kernels)})"
