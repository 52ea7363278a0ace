"""One configuration class a method: PEFT configurations that hold hyper-parameters and nothing trained."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, cast

from peft import PeftConfig

from randbasis.adapter_file.spec import check_tied
from randbasis.contraction import check_order
from randbasis.errors import HyperparameterError, TargetError, TieError, UnknownMethodError, near
from randbasis.methods import LoraXs, Method, Nola, Pranc, RandLora, Vera, method_class
from randbasis.precision import check_training_precision
from randbasis.rounding import check_rounding
from randbasis.ties import UNTIED, check_tie
from randbasis.tuner.registration import PEFT_TYPE
from randbasis.tuner.run_state import RunState
from randbasis.tuner.targets import check_expression, split_slices

REQUIRES = "randbasis: pip install randbasis, and import randbasis before the adapter is loaded"
"""Without the import PEFT says ``KeyError: 'RANDBASIS'`` and no more: it has no place for a package to be asked."""


@dataclass
class RandbasisConfig(PeftConfig):
    """What all methods have in common; make one of the subclasses.

    Called with ``method="nola"`` it gives that method's class, which is how a saved ``adapter_config.json`` finds its
    way back.

    Args:
        method: ``"nola"``, ``"vera"``, ``"randlora"``, ``"pranc"`` or ``"loraxs"``; set by the subclass.
        seed: 64-bit seed that all frozen matrices are drawn from.
        law: ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse(s)"``; for NOLA and PRANC also ``"hashed"``, whose
            k is the number of basis matrices, math (25).
        target_modules: module names (list), one regular expression (str), ``"all-linear"``, or None for the usual
            ones of a known architecture. A list may name slices of a fused projection: ``"c_attn[q,v]"``.
        exclude_modules: names (list) or a regular expression (str) of modules to leave alone.
        modules_to_save: modules to train and save whole beside the adapter, such as a classifier head.
        layers_to_transform: indices of the layers to adapt; only with a list of names.
        layers_pattern: name of the list of layers, when it is not the usual one.
        bias: ``"none"``, ``"all"`` or ``"randbasis_only"``: which biases of the base model train too.
        dropout: probability of dropping an input of the adapter in training.
        init_weights: False starts from random coefficients drawn from the seed, so that ΔW is not 0 (for tests).
        basis_storage: ``"auto"``, ``"packed"``, ``"dense"`` or ``"recompute"``; changes cost, never values.
        contraction: ``"auto"``, ``"token"`` (19) or ``"weight"`` (20); changes cost, never values.
        fuse_rounding: on a base in half precision, whether training may make ``W0 + ΔW`` one matrix, rounded: it saves
            a product of the tokens forward and one back, and changes what is computed. ``"none"``: exact;
            ``"nearest"``: what is below half of the last bit of W0 has no effect; ``"stochastic"``: right in the mean.
            Evaluation and merging stay exact, so they see another ΔW than training did.
        quantize_coefficients: 8, 4, 3 or 2: compute with coefficients of so many bits, one scale a vector (11), in
            training as afterwards, and train the full-precision ones straight through; those are what is saved, so
            that training can go on. None computes with them as they are.
        tie: ``"matrix"``: coefficients of its own for each matrix; ``"block:N"``: one vector for N consecutive blocks;
            ``"model"``: one for all, math (26). A block is what the first number in a module's path counts
            (``layers.3``); modules in no block are a group of their own. Only for NOLA and PRANC, and with a basis of
            its own for each matrix: ``share_basis`` is then False, since one vector on one basis would be one ΔW.
        rank_pattern: regular expression of module names → r, instead of the common one.
        target_slices: parts of each sliced module; filled from ``target_modules``.
        base_shapes: shapes of the layers that a saved adapter was made for; checked when it is put on a model.
        base_rows: first row and row after the last of each part of a fused projection that it was made for.
        base_model_type: ``model_type`` of the base that it was made for.
        base_weights: digest of the base weights that frozen matrices are made of, where there are such; checked, too.
        requires: the package to import before PEFT can read the file, for those who find the file alone.

    Raises:
        RandbasisError: a value that its method cannot take, each rule with its own class.
    """

    method_cls: ClassVar[type[Method]] = Method
    patterns: ClassVar[tuple[tuple[str, str], ...]] = (("rank_pattern", "r"),)

    method: str = ""
    seed: int = 0
    law: str = "sign"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    dropout: float = 0.0
    init_weights: bool = True
    basis_storage: str = "auto"
    contraction: str = "auto"
    fuse_rounding: str = "none"
    quantize_coefficients: int | None = None
    tie: str = UNTIED
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    target_slices: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    base_shapes: dict[str, list[int]] | None = None
    base_rows: dict[str, list[int]] | None = None
    base_model_type: str | None = None
    base_weights: str | None = None
    requires: str = REQUIRES

    def __new__(cls, *_: Any, **options: Any) -> "RandbasisConfig":
        """The class of the named method when the base class is called, as PEFT does with a saved configuration."""
        if cls is not RandbasisConfig or "method" not in options:
            return super().__new__(cls)
        chosen = config_class(options["method"])
        known = {f.name for f in fields(chosen)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise HyperparameterError(
                f"{chosen.__name__} has no option {unknown[0]!r} ({near(unknown[0], known)}); "
                "the adapter may come from a newer version of randbasis: upgrade, or remove the option"
            )
        return object.__new__(chosen)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self) is RandbasisConfig:
            raise UnknownMethodError("method must be named, got ''; use NolaConfig, VeraConfig, RandLoraConfig, ...")
        if self.method != self.method_cls.name:
            raise UnknownMethodError(
                f"{type(self).__name__} is for method {self.method_cls.name!r}, got method={self.method!r}; "
                "leave it out"
            )
        self.peft_type = PEFT_TYPE
        self._methods: dict[str, Method] = {}
        self._check_common()
        self._settle_basis()
        self._split_targets()
        if self.tie != UNTIED:
            check_tied(self.method_for(""))
        self.method_for("")
        self.run = RunState()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "RandbasisConfig":
        """As PEFT's, and remember the folder, whose weights are checked before a model is touched."""
        config = cast("RandbasisConfig", super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs))
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        config.run = RunState(folder=folder if folder.is_dir() else None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options as a mapping, with what is known of the model and the layers adapted last."""
        return {**super().to_dict(), **self.run.made_for}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, and name this package in the card that PEFT has written beside it."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "library_name: peft" in text.partition("\n---")[0] and REQUIRES not in text:
            card.write_text(f"{text.rstrip()}\n\nRequires {REQUIRES}.\n", encoding="utf-8")

    def _check_common(self) -> None:
        check_order(self.contraction)
        check_rounding(self.fuse_rounding)
        check_training_precision(self.quantize_coefficients)
        if not 0.0 <= self.dropout < 1.0:
            raise HyperparameterError(f"dropout must be in [0, 1), got {self.dropout}; use 0.0 for none")
        if self.bias not in ("none", "all", "randbasis_only"):
            raise HyperparameterError(
                f"bias must be 'none', 'all' or 'randbasis_only', got {self.bias!r}; 'none' is the usual choice"
            )
        if self.layers_to_transform is not None:
            self._check_layers(self.layers_to_transform)
        if self.layers_pattern and self.layers_to_transform is None:
            raise TargetError("layers_pattern needs layers_to_transform, got None; name the layers to adapt")
        self._check_patterns()

    def _settle_basis(self) -> None:
        """Own streams where coefficients are shared; elsewhere one basis for all, unless another is asked for."""
        check_tie(self.tie)
        if not hasattr(self, "share_basis"):
            return
        asked: bool | None = cast("Any", self).share_basis
        if self.tie != UNTIED and asked:
            raise TieError(
                f"tie={self.tie!r} needs share_basis=False, got share_basis={asked!r}: matrices with one vector on one "
                "basis would all have one ΔW; leave share_basis out"
            )
        cast("Any", self).share_basis = self.tie == UNTIED if asked is None else asked

    def _check_layers(self, layers: Any) -> None:
        if isinstance(self.target_modules, str):
            instead = (
                "name the modules" if self.target_modules == "all-linear" else "put the numbers into that expression"
            )
            raise TargetError(
                f"layers_to_transform needs target_modules as a list of names, got the string {self.target_modules!r}; "
                f"{instead} instead"
            )
        numbers = cast("list[Any]", layers if isinstance(layers, list | tuple | set) else [layers])
        if not numbers or not all(type(one) is int and one >= 0 for one in numbers):
            raise TargetError(
                f"layers_to_transform must be a number of a layer or a list of them, counted from 0, got {layers!r}; "
                "use for example [0, 1], or leave it out for all layers"
            )

    def _check_patterns(self) -> None:
        """Every regular expression, in the form that it is matched in."""
        for name, _ in self.patterns:
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise HyperparameterError(
                    f"{name} must map regular expressions of module names to values, got {patterns!r}; "
                    f"use for example {name}={{'q_proj': 4}}"
                )
            for pattern in cast("dict[Any, Any]", patterns):
                check_expression(name, pattern, rf"(.*\.)?({pattern})$", HyperparameterError)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                check_expression(name, expression, expression, TargetError)
        layers = self.layers_pattern or []
        for pattern in [layers] if isinstance(layers, str) else layers:
            check_expression("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", TargetError)
        for pattern in self.modules_to_save or []:
            check_expression("modules_to_save", pattern, rf"(^|.*\.){pattern}($|\..*)", TargetError)

    def _split_targets(self) -> None:
        if self.target_modules is None or isinstance(self.target_modules, str):
            return
        names, slices = split_slices(self.target_modules)
        self.target_modules = names
        for name, parts in slices.items():
            known = self.target_slices.setdefault(name, [])
            known.extend(part for part in parts if part not in known)

    def method_for(self, key: str) -> Method:
        """The method of the module ``key``: common hyper-parameters, overridden where a pattern matches.

        Args:
            key: module path; ``""`` gives the common ones.
        """
        options = {f.name: getattr(self, f.name) for f in fields(self.method_cls)}
        for pattern_field, option in self.patterns:
            for pattern, value in getattr(self, pattern_field).items():
                if key and re.match(rf"(.*\.)?({pattern})$", key):
                    options[option] = value
                    break
        said = repr(options)  # tells True from 1 and takes values that cannot be hashed, which the method refuses
        if said not in self._methods:
            self._methods[said] = self.method_cls(**options)
        return self._methods[said]

    def hyperparameters(self) -> dict[str, Any]:
        """What its method is told of a whole model: seed, law, rank, ...; not how the basis is kept."""
        names = {f.name for f in fields(self.method_cls)} - {"basis_storage"}
        return {name: getattr(self, name) for name in sorted(names)}


@dataclass
class NolaConfig(RandbasisConfig):
    """NOLA, math (6)-(10): ``k + l`` coefficients a matrix, whatever its shape and rank.

    Args:
        r: rank of the factors.
        num_basis: ``k``, basis matrices of A.
        num_basis_b: ``l``, basis matrices of B; None means ``k``.
        alpha: numerator of the scaling ``alpha / r``.
        parametrization: ``"offset"`` (7) or ``"plain"`` (8).
        share_basis: one basis for all layers (9), or one a matrix; then its stream is stored beside the coefficients.
            None takes the former, but the latter where coefficients are shared (``tie``).
        alpha_pattern: regular expression of module names → alpha.
        num_basis_pattern: regular expression of module names → num_basis.
    """

    method_cls: ClassVar[type[Method]] = Nola
    patterns: ClassVar[tuple[tuple[str, str], ...]] = (
        ("rank_pattern", "r"),
        ("alpha_pattern", "alpha"),
        ("num_basis_pattern", "num_basis"),
    )

    method: str = "nola"
    r: int = 8
    num_basis: int = 128
    num_basis_b: int | None = None
    alpha: float = 8.0
    parametrization: str = "offset"
    share_basis: bool | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    num_basis_pattern: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class VeraConfig(RandbasisConfig):
    """VeRA, math (12)-(13): ``r + out`` coefficients a matrix.

    Args:
        r: rank of the shared pair.
        d_initial: start of ``d``.
    """

    method_cls: ClassVar[type[Method]] = Vera

    method: str = "vera"
    r: int = 256
    d_initial: float = 0.1


@dataclass
class RandLoraConfig(RandbasisConfig):
    """RandLoRA, math (14)-(17): full rank, ``n (r + min)`` coefficients a matrix.

    Args:
        r: rank of one term; coefficients go with its inverse.
        scaling: ``"hf"`` = alpha / r or ``"paper"`` = 2/√n (15).
        alpha: of the ``"hf"`` scaling; None means 20 r.
        alpha_pattern: regular expression of module names → alpha.
    """

    method_cls: ClassVar[type[Method]] = RandLora
    patterns: ClassVar[tuple[tuple[str, str], ...]] = (("rank_pattern", "r"), ("alpha_pattern", "alpha"))

    method: str = "randlora"
    r: int = 32
    scaling: str = "hf"
    alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])


@dataclass
class PrancConfig(RandbasisConfig):
    """PRANC, math (18): ``k`` coefficients a matrix.

    Args:
        num_basis: ``k``, dense basis matrices.
        share_basis: one basis for all layers, or one a matrix; None as for NOLA.
        num_basis_pattern: regular expression of module names → num_basis.
    """

    method_cls: ClassVar[type[Method]] = Pranc
    patterns: ClassVar[tuple[tuple[str, str], ...]] = (("num_basis_pattern", "num_basis"),)

    method: str = "pranc"
    num_basis: int = 128
    share_basis: bool | None = None
    num_basis_pattern: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_pattern:
            raise HyperparameterError(
                f"rank_pattern has no meaning for PRANC, which has no rank, got {self.rank_pattern}; "
                "use num_basis_pattern"
            )


@dataclass
class LoraXsConfig(RandbasisConfig):
    """LoRA-XS, math (27)-(29): ``r²`` coefficients a matrix, between the leading singular vectors of the base weight.

    Args:
        r: singular vectors.
        alpha: numerator of the scaling ``alpha / r``.
        alpha_pattern: regular expression of module names → alpha.
    """

    method_cls: ClassVar[type[Method]] = LoraXs
    patterns: ClassVar[tuple[tuple[str, str], ...]] = (("rank_pattern", "r"), ("alpha_pattern", "alpha"))

    method: str = "loraxs"
    r: int = 16
    alpha: float = 16.0
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])


CONFIGS: dict[str, type[RandbasisConfig]] = {
    config.method_cls.name: config for config in (NolaConfig, VeraConfig, RandLoraConfig, PrancConfig, LoraXsConfig)
}
"""Method name → configuration class."""


def config_class(method: str) -> type[RandbasisConfig]:
    """The configuration class of a method.

    Raises:
        UnknownMethodError: there is no such method.
    """
    return CONFIGS[method_class(method).name]
