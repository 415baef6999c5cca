"""The result: settings, the calls for the training script, and the report."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from lightning_mics.config import MiCSConfig

# Both frameworks step a scheduler otherwise than DeepSpeed unless told so.
_SCHEDULER_COMMENTS = (
    '# Trainer: return [optimizer], [{"scheduler": scheduler, "interval": "step"}]',
    "# Accelerate: a prepared scheduler steps once for each process. Leave it out of",
    "# prepare(), call accelerator.register_for_checkpointing(scheduler), and step it",
    "# if accelerator.sync_gradients.",
)


class Code(str):
    """A Python expression; printed as it is, not as a string."""

    __slots__ = ()


@dataclass(frozen=True)
class Field:
    """One leaf field of the JSON, and what became of it.

    Attributes:
        key: Its place, with dots: ``"zero_optimization.stage"``.
        value: Its value in the file.
        note: What became of it, or what to do instead.
    """

    key: str
    value: Any
    note: str

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A class or function to call in the training script.

    Attributes:
        target: Its full name, such as ``"torch.optim.AdamW"``.
        arguments: Keyword arguments. A :class:`Code` is an expression.
        unset: Names that the expressions use and the script has to give values to (``"auto"`` in the file).
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()

    def source(self, first: str) -> str:
        """Returns the call as Python source, with ``first`` as its positional argument."""
        return f"{self.target}({', '.join([first, *keyword_list(self.arguments)])})"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a DeepSpeed configuration becomes.

    Every leaf field of the file is in exactly one of ``carried``, ``changed`` and ``no_counterpart``.

    Attributes:
        config: The settings of MiCS.
        source: Name of the file, or a word for what was given instead.
        gradient_accumulation_steps: Microsteps of a window; ``None`` where the file leaves it open.
        micro_batch_size: Samples a rank sees in a microstep.
        global_batch_size: Samples of an optimizer step, over all ranks.
        world_size: Number of ranks: the one given, or what the batch sizes imply.
        clip_norm: Norm at which gradients are clipped; ``None`` for no clipping.
        precision: Lightning's ``precision``; ``None`` for its default.
        mixed_precision: Accelerate's ``mixed_precision``; ``None`` for its default.
        grad_scaler: Arguments of the float16 loss scaler that differ from PyTorch's defaults.
        optimizer: The optimizer to create; ``None`` if the file names none that PyTorch has.
        scheduler: The scheduler to create, to be stepped with each optimizer step.
        hints: What the file does not say, and DeepSpeed does by default.
        carried: Fields with the same meaning here.
        changed: Fields that became something else, or are not needed.
        no_counterpart: Fields without a counterpart, each with what to do instead.
    """

    config: MiCSConfig
    source: str
    gradient_accumulation_steps: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    world_size: int | None = None
    clip_norm: float | None = None
    precision: str | None = None
    mixed_precision: str | None = None
    grad_scaler: Mapping[str, float] = field(default_factory=dict)
    optimizer: Call | None = None
    scheduler: Call | None = None
    hints: tuple[str, ...] = ()
    carried: tuple[Field, ...] = ()
    changed: tuple[Field, ...] = ()
    no_counterpart: tuple[Field, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Returns the shard size and the settings of ``config`` that differ from the defaults, as plain values."""
        values = {item.name: getattr(self.config, item.name) for item in dataclasses.fields(MiCSConfig)}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
            if name == "shard_size" or value != getattr(MiCSConfig(), name)
        }

    def to_yaml(self) -> str:
        """Returns a file for :meth:`MiCSConfig.from_yaml <lightning_mics.MiCSConfig.from_yaml>`.

        What belongs into the training script stands in its comments.
        """
        lines = [f"MiCS settings converted from {self.source}. Read them with MiCSConfig.from_yaml(...)."]
        if outside := self._script_settings():
            lines += ["", "Not MiCS settings, but for the training script:"]
            lines += [f"  {name}: {value}" for name, value in outside]
        comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return comments + "\n" + yaml.safe_dump(self.settings(), sort_keys=False)

    def lightning_cli_yaml(self) -> str:
        """Returns a ``trainer`` section for LightningCLI."""
        trainer = {name: value for name, value in self._trainer_arguments().items() if not isinstance(value, Code)}
        strategy = {"class_path": "lightning_mics.MiCSStrategy", "init_args": self.settings()}
        comment = f"# Converted from {self.source}. For LightningCLI; add num_nodes and devices.\n"
        return comment + yaml.safe_dump({"trainer": {"strategy": strategy, **trainer}}, sort_keys=False)

    def trainer_code(self) -> str:
        """Returns the lines that create a Lightning ``Trainer``."""
        imports = ["from lightning.pytorch import Trainer", "from lightning_mics import MiCSStrategy"]
        if self.grad_scaler:
            imports.insert(0, "import torch")
            imports.insert(2, "from lightning.pytorch.plugins import MixedPrecision")
        strategy = Code(f"MiCSStrategy({', '.join(keyword_list(self.settings()))})")
        call = _layout_call("trainer = Trainer", {"strategy": strategy, **self._trainer_arguments()})
        return "\n".join([*imports, "", call])

    def accelerate_code(self) -> str:
        """Returns the lines that create a ``MiCSAccelerator`` and clip with it."""
        imports = ["from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin"]
        arguments: dict[str, Any] = {"mics_plugin": Code(f"MiCSPlugin({', '.join(keyword_list(self.settings()))})")}
        if self.gradient_accumulation_steps is not None:
            arguments["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        if self.mixed_precision is not None:
            arguments["mixed_precision"] = self.mixed_precision
        if self.grad_scaler:
            imports.insert(0, "from accelerate.utils import GradScalerKwargs")
            arguments["kwargs_handlers"] = Code(f"[GradScalerKwargs({', '.join(keyword_list(self.grad_scaler))})]")
        lines = [*imports, "", _layout_call("accelerator = MiCSAccelerator", arguments)]
        if self.clip_norm is not None:
            lines += ["", "if accelerator.sync_gradients:  # before optimizer.step()"]
            lines += [f"    accelerator.clip_grad_norm_(model.parameters(), {self.clip_norm})"]
        return "\n".join(lines)

    def optimizer_code(self) -> str:
        """Returns the lines that create optimizer and scheduler; an empty text if the file names neither."""
        calls = [("optimizer", self.optimizer, "model.parameters()"), ("scheduler", self.scheduler, "optimizer")]
        imports: set[str] = set()
        unset: dict[str, None] = {}
        body: list[str] = []
        for name, call, first in calls:
            if call is None:
                continue
            imports.add(f"import {call.target.partition('.')[0]}")
            if "math." in call.source(first):
                imports.add("import math")
            unset.update(dict.fromkeys(call.unset))
            body.append(_layout_call(f"{name} = {call.target}", {"": Code(first), **call.arguments}))
        if self.scheduler:
            body += _SCHEDULER_COMMENTS
        missing = [f"{name} = ...  # 'auto' in the file" for name in unset]
        return "\n".join([*sorted(imports), "", *missing, *body]) if body else ""

    def _trainer_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.gradient_accumulation_steps is not None:
            arguments["accumulate_grad_batches"] = self.gradient_accumulation_steps
        if self.grad_scaler:
            # Lightning takes a scaler only inside a precision plugin, and then no ``precision``.
            scaler = f"torch.amp.GradScaler({', '.join(keyword_list(self.grad_scaler))})"
            arguments["plugins"] = Code(f'MixedPrecision("16-mixed", "cuda", scaler={scaler})')
        elif self.precision is not None:
            arguments["precision"] = self.precision
        if self.clip_norm is not None:
            arguments["gradient_clip_val"] = self.clip_norm
        return arguments

    def _script_settings(self) -> list[tuple[str, str]]:
        names: dict[str, Any] = {
            "micro batch of a rank": self.micro_batch_size,
            "gradient accumulation": self.gradient_accumulation_steps,
            "global batch": self.global_batch_size,
            "gradient clipping (norm)": self.clip_norm,
            "precision (Lightning)": self.precision,
            "mixed_precision (Accelerate)": self.mixed_precision,
            "optimizer": self.optimizer.source("model.parameters()") if self.optimizer else None,
            "scheduler": self.scheduler.source("optimizer") if self.scheduler else None,
        }
        return [(name, str(value)) for name, value in names.items() if value is not None]


def literal(value: Any) -> str:
    """Returns a value as Python source."""
    if isinstance(value, str) and not isinstance(value, Code):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, Code) else repr(value)


def keyword_list(arguments: Mapping[str, Any]) -> list[str]:
    """Returns arguments as Python source; one without a name is positional."""
    return [f"{name}={literal(value)}" if name else literal(value) for name, value in arguments.items()]


def _layout_call(function: str, arguments: Mapping[str, Any], width: int = 76) -> str:
    """Returns a call on one line if it fits, else with an argument a line."""
    keywords = keyword_list(arguments)
    line = f"{function}({', '.join(keywords)})"
    if len(line) <= width:
        return line
    return f"{function}(\n" + textwrap.indent("".join(f"{keyword},\n" for keyword in keywords), "    ") + ")"
