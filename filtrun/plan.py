"""Plan: a composed configuration turned into checked objects, before anything is read, trained or written."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from filtrun.build import build, resolve, typed
from filtrun.cells import MACHINE_KEYS, MACHINE_OPTIONS, with_arithmetic, without_later
from filtrun.errors import Unfit, UserError, unknown
from filtrun.loggers import Logger
from filtrun.method import Method
from filtrun.options import check_options
from filtrun.speed import SPEEDS
from filtrun.task import Task
from filtrun.trainer import Trainer

if TYPE_CHECKING:
    from torch import nn

    from filtrun.data.base import Data

BASES = ("pretrain", "scratch", "checkpoint", "hub")
CLASSES = ("auto", "all", "target", "source")
NORMALIZE = ("data", "imagenet", "half", "none")
PARTS = ("data", "model", "task", "trainer", "pretrain", "stages")


@dataclass
class Plan:
    """Everything a run is made of. `config` is the plain composed configuration, `choices` the option of each group."""

    config: dict[str, Any]
    choices: dict[str, str]
    trainer: Trainer
    pretrain: Trainer
    data: Data
    task: Task
    methods: list[Method]
    loggers: list[Logger]
    base: str
    which: str
    trust: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Short name for tables: the given one, or method-data-model."""
        methods = "+".join(m.slug for m in self.methods) or "none"
        return str(self.config.get("name") or "") or f"{methods}-{self.choices.get('data')}-{self.choices.get('model')}"

    @property
    def keeps(self) -> str | None:
        """The classes a pre-trained base should not forget."""
        return "source" if self.base == "pretrain" and self.which == "target" else None

    def make_model(self, pretrained: bool = False) -> nn.Module:
        """Build the model for the data (which must be set up); its weights come from torch's global generator."""
        more: dict[str, Any] = {}
        if pretrained:
            target = resolve(self.config["model"]["_target_"], self.trust)
            if "pretrained" not in inspect.signature(target).parameters:
                raise UserError(
                    f"model={self.choices.get('model')} has no weights on a hub; use model.base=checkpoint with "
                    "model.checkpoint=FILE, or model=timm or model=diffusers"
                )
            more["pretrained"] = True
        return new_model(self.config, self.task, self.data, **more)

    def key(self) -> str:
        """16 hex digits: configuration without machine keys, data content and code version."""
        from filtrun import runner
        from filtrun.code_version import code_version, module_version
        from filtrun.stages import digest

        config = {k: copy.deepcopy(v) for k, v in self.config.items() if k not in (*MACHINE_KEYS, "speed")}
        config = with_arithmetic(config)
        for option in MACHINE_OPTIONS:
            config["trainer"].pop(option, None)
            config["pretrain"].pop(option, None)
        for place in self.data.places:
            config["data"].pop(place, None)
        model = resolve(self.config["model"]["_target_"], self.trust)
        code = code_version(model, self.task, *self.methods) | {runner.__name__: module_version(runner.__name__)}
        return digest({"config": without_later(config), "data": self.data.fingerprint(), "code": code})


def make_plan(config: Mapping[str, Any], choices: Mapping[str, str] | None = None) -> Plan:
    """Check a composed configuration and build its parts (not the model: its sizes come from the data).

    Raises UserError for a wrong key, type or value, and for parts that do not fit each other.
    """
    from filtrun.data.base import Data

    cfg = dict(config)
    _check_keys(cfg)
    trust = list(cfg.get("trust") or [])
    _check_choice("model.base", cfg["model"].get("base", "pretrain"), BASES)
    _check_choice("model.normalize", cfg["model"].get("normalize", "data"), NORMALIZE)
    _check_choice("classes", cfg["classes"], CLASSES)
    _check_choice("speed", cfg.get("speed", "off"), SPEEDS)
    for key, low in (("seed", 0), ("split_seed", 0), ("workers", 1)):
        if not isinstance(cfg[key], int) or isinstance(cfg[key], bool) or cfg[key] < low:
            raise UserError(f"{key}={cfg[key]!r} must be a whole number from {low}")
    most = cfg.get("vectorize", False)
    if not isinstance(most, (bool, int)) or most < 0:
        raise UserError(f"vectorize={most!r} must be true, false or the number of cells to train at once")
    threads = cfg.get("threads")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise UserError(f"threads={threads!r} must be a whole number from 1, or null")
    trainer = make_trainer(cfg["trainer"], "trainer")
    _check_choice("pretrain.classes", cfg["pretrain"].get("classes", "source"), ("source", "all"))
    base = cfg["model"].get("base", "pretrain")
    methods = make_methods(cfg.get("method") or {}, trust)
    if cfg["classes"] == "auto" and base == "pretrain" and "target" in cfg["data"] and _only_samples(methods):
        # nothing learns the held-out classes, so there is nothing to hold out: the base knows all it is asked for
        known = "all" if cfg["data"].get("source") is None else "source"
        cfg = {**cfg, "classes": known, "data": {**cfg["data"], "target": []}}
    which = cfg["classes"] if cfg["classes"] != "auto" else ("target" if base == "pretrain" else "all")
    plan = Plan(
        config=cfg,
        choices=dict(choices or {}),
        trainer=trainer,
        pretrain=pretrainer(cfg),
        data=build(cfg["data"], Data, "data", trust=trust),
        task=build(cfg["task"], Task, "task", trust=trust),
        methods=methods,
        loggers=[build(node, Logger, f"logger.{k}", trust=trust) for k, node in (cfg.get("logger") or {}).items()],
        base=base,
        which=which,
        trust=trust,
    )
    check_fit(plan)
    return plan


def make_trainer(node: Mapping[str, Any], where: str) -> Trainer:
    """A checked Trainer from its config node."""
    trainer = Trainer(**typed(Trainer, node, where))
    check_options(trainer, where)
    return trainer


def pretrainer(config: Mapping[str, Any]) -> Trainer:
    """How a base is trained: the run's options, but for those that ``pretrain`` sets."""
    own = config["pretrain"]
    options = {**config["trainer"], **{k: v for k, v in own.items() if k not in ("seed", "classes")}}
    if own.get("steps") is not None:
        options["epochs"] = None
    elif own.get("epochs") is not None:
        options["steps"] = None
    return make_trainer(options, "pretrain")


def new_model(config: Mapping[str, Any], task: Task, data: Data, **more: Any) -> nn.Module:
    """An untrained model of a configuration for `data`, which is set up; its weights come from torch's generator."""
    from torch import nn

    sizes = {name: value for name, value in task.sizes(data).items() if name not in config["model"]} | more
    return build(config["model"], nn.Module, "model", trust=list(config.get("trust") or []), **sizes)


def make_methods(nodes: Mapping[str, Any], trust: list[str]) -> list[Method]:
    """The methods of a run in their order, each knowing its key in the config."""
    methods = []
    for slug, node in nodes.items():
        if not isinstance(node, Mapping):
            raise UserError(f"method.{slug}={node!r} is no method; choose one with method={slug}")
        method = build(node, Method, f"method.{slug}", trust=trust)
        method.slug = slug
        methods.append(method)
    return methods


def _only_samples(methods: list[Method]) -> bool:
    """Whether the methods of a run train nothing and act when samples are drawn: guidances and samplers."""
    acts = any(getattr(type(m), hook) is not getattr(Method, hook) for m in methods for hook in ("guide", "sampler"))
    return acts and all(m.trains == "nothing" for m in methods)


def check_fit(plan: Plan) -> None:
    """Raise Unfit when model, task and methods do not go together, naming what would; UserError for missing options."""
    owners = [method.slug for method in plan.methods if method.own_step is not None]
    if len(owners) > 1:  # before their tasks, which may differ too
        raise Unfit(f"method={owners[0]} and method={owners[1]} both own the training step; use one of them")
    kind, model = plan.task.kind, plan.choices.get("model", "model")
    tasks = plan.config["model"].get("tasks") or [kind]
    if kind not in tasks:
        raise Unfit(f"model={model} does task={' or '.join(tasks)}, not task={kind}; {_models_for(kind)}")
    plan.task.check_data(plan.data)
    for method in plan.methods:
        node = plan.config["method"][method.slug]
        fits = (node.get("needs") or {}).get("tasks") or method.tasks
        if fits is not None and kind not in fits:
            raise Unfit(
                f"method={method.slug} works with task={' or '.join(fits)}, not task={kind}; {_models_for(fits[0])}"
            )
    rules = [method.slug for method in plan.methods if method.combines]
    if len(rules) > 1:
        raise Unfit(
            f"method={rules[0]} and method={rules[1]} both say how the conditional and the unconditional prediction "
            "are combined; use one of them"
        )
    if plan.base == "checkpoint" and not plan.config["model"].get("checkpoint"):
        raise UserError("model.base=checkpoint needs model.checkpoint=FILE (a .safetensors or .pth file of weights)")
    if plan.base != "checkpoint" and plan.config["model"].get("checkpoint"):
        raise UserError(f"model.checkpoint is set but model.base={plan.base}; set model.base=checkpoint to use it")


def _models_for(kind: str) -> str:
    from filtrun.catalogue import entries

    names = [e.name for e in entries("models") if kind in e.tasks]
    return f"models that do {kind}: {', '.join(names)}"


@functools.cache
def _known_keys() -> frozenset[str]:
    """The top-level keys of the composed configuration: those of config.yaml and the groups it chooses from."""
    from filtrun.catalogue import conf_dir
    from filtrun.config_file import read_yaml

    return frozenset(read_yaml(conf_dir() / "config.yaml")) - {"defaults", "hydra"} | {
        *PARTS,
        "scale",
        "method",
        "logger",
    }


def _check_keys(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for a top-level key that is unknown, or whose value has the wrong shape."""
    known = _known_keys()
    for key in cfg:
        if key not in known:
            raise unknown("key", key, known)
    for key in (*PARTS, "method", "logger"):
        if not isinstance(cfg.get(key), Mapping) and (key in PARTS or cfg.get(key) is not None):
            raise UserError(f"{key}={cfg.get(key)!r} must hold options; set them one by one: {key}.KEY=VALUE")
    trust = cfg.get("trust")
    if not isinstance(trust, (list, tuple, type(None))):
        raise UserError(f"trust={trust} must be a list of packages; write trust=[{trust}]")
    if not isinstance(cfg["stages"].get("root"), str):
        raise UserError(f"stages.root={cfg['stages'].get('root')!r} must be a folder, for example outputs/stages")
    if isinstance(cfg.get("name"), (Mapping, list)):
        raise UserError(f"name={cfg['name']!r} must be text")
    if not isinstance(cfg.get("force"), bool):
        raise UserError(f"force={cfg.get('force')!r} must be true or false")


def _check_choice(key: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise unknown(key, value, options)
