"""What is installed here and what a configuration makes: the report of ``rlr-fast info``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

from cyclopts import Parameter

from rlr_fast.cli import flags
from rlr_fast.config import (
    PRESETS,
    Backend,
    ExecutionConfig,
    RLRConfig,
    from_dict,
    level_name,
    per_level,
    short_windows,
)

if TYPE_CHECKING:
    import torch

    from rlr_fast.models.reconstructor import Reconstructor


def describe(config: RLRConfig | None, device: torch.device) -> tuple[dict[str, Any], str]:
    """Return versions, devices, backends, and the levels and parameters of a configuration, if any.

    The backbone's weights need not be at hand: the same network with random numbers has the same
    shapes.

    Returns:
        The report as plain values, and as text.
    """
    import torch

    from rlr_fast.functional import resolve_backend, unsupported_reason
    from rlr_fast.models.environment import environment

    values: dict[str, Any] = {"environment": environment(device)}
    values["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    values["backends"] = {
        name: unsupported_reason(name, device) or "available"
        for name in get_args(Backend)
        if name != "auto"
    }
    values["auto"] = resolve_backend("auto", device)
    values["compile"] = "off; --compile of train, eval, calibrate and predict turns it on"
    text = _text(values)
    if config is not None:
        values["model"] = _model(config)
        text += f"\n\n{_model_text(values['model'])}"
    return values, text


def _model(config: RLRConfig) -> dict[str, Any]:
    from rlr_fast.models.backbone_weights import describe_weights
    from rlr_fast.models.rlr import RLRModel

    weights = describe_weights(config.backbone, config.backbone_weights)
    model = RLRModel(dataclasses.replace(config, backbone_weights="random"))
    backbone = model.backbone
    reconstructors = cast("list[Reconstructor]", list(model.levels))
    levels = [
        {
            "index": index if isinstance(index, int) else level_name(index),
            "channels": channels,
            "components": components,
            "grid": list(grid),
            "patch": level.patch,
            "tokens": grid[0] * grid[1] // level.patch**2,
            "hidden": level.hidden,
            "heads": level.heads,
            "window": short_windows([level.window])[0],
            "parameters": sum(p.numel() for p in level.parameters()),
        }
        for index, channels, components, grid, level in zip(
            config.out_indices,
            backbone.channels,
            per_level(config.components, len(config.out_indices)),
            backbone.grids,
            reconstructors,
            strict=True,
        )
    ]
    uncertainty = sum(p.numel() for p in model.uncertainty.parameters())
    return {
        "config": config.to_dict(),
        "backbone_weights": weights,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
        "levels": levels,
        "uncertainty_parameters": uncertainty,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _text(values: dict[str, Any]) -> str:
    env = values["environment"]
    lines = [
        f"python {env['python']} on {env['platform']}",
        ", ".join(f"{k} {v or 'missing'}" for k, v in env["packages"].items()),
        f"device: {env['device']} ({env['device_name']}, {env['threads']} threads); "
        f"GPUs: {', '.join(values['gpus']) or 'none'}",
        "",
        "attention backends",
        *(f"  {name:8s}{state}" for name, state in values["backends"].items()),
        f"  auto    takes {values['auto']}",
        "",
        f"torch.compile: {values['compile']}",
    ]
    return "\n".join(lines)


def _model_text(model: dict[str, Any]) -> str:
    config = model["config"]
    tile = "" if config["tile"] is None else " from tiles of {}x{} px".format(*config["tile"])
    lines = [
        f"backbone {config['backbone']} at {config['image_size'][0]}x{config['image_size'][1]} px"
        f"{tile}, {model['backbone_parameters']:,} parameters, frozen",
        f"  weights ({config['backbone_weights']}): {model['backbone_weights']}",
        "",
        "level  channels  components  grid      patch  tokens  hidden  heads  window   parameters",
    ]
    for level in model["levels"]:
        grid = "x".join(map(str, level["grid"]))
        window = level["window"]
        window = window if isinstance(window, int) else "x".join(map(str, window))
        lines.append(
            f"{level['index']:>5}  {level['channels']:8d}  {level['components'] or 'all':>10}  "
            f"{grid:8s}  {level['patch']:5d}  "
            f"{level['tokens']:6d}  {level['hidden']:6d}  {level['heads']:5d}  {window!s:>6s}  "
            f"{level['parameters']:11,d}"
        )
    lines.append(
        f"{config['blocks']} blocks per level, attention {' + '.join(config['attention'])}, "
        f"alpha {config['alpha']}, fusion {config['fusion']}, references {config['references']}: "
        f"{model['trained_parameters']:,} trained parameters"
    )
    if config["uncertainty"]:
        lines.append(
            f"uncertainty {config['uncertainty']}: {model['uncertainty_parameters']:,} parameters, "
            "fitted after training"
        )
    return "\n".join(lines)


def info(
    *,
    preset: flags.Preset | None = None,
    checkpoint: Path | None = None,
    as_json: Annotated[flags.Switch, Parameter(name="--json")] = False,
    config: flags.Config | None = None,
    model: flags.Model = flags.NONE_GIVEN,
    execution: flags.Place = flags.NONE_GIVEN,
) -> int:
    """Show versions, devices and backends; with a preset, a run or settings, the model they give.

    Args:
        checkpoint: Folder of a run, or OWNER/NAME on the hub, whose model is described, in place of
            a preset's.
        as_json: Write JSON.
    """
    from rlr_fast.models.checkpoint import CONFIG_FILE, fetch_checkpoint, load_config
    from rlr_fast.models.environment import start_device

    if preset is not None and checkpoint is not None:
        raise ValueError("--preset and --checkpoint each name a model; give one of them")
    described = None
    if preset is not None or checkpoint is not None or model:
        base = PRESETS[preset or "paper"].model
        if checkpoint is not None:
            base = load_config(fetch_checkpoint(checkpoint) / CONFIG_FILE)
        described = from_dict(RLRConfig, model, base)
    values, text = describe(described, start_device(ExecutionConfig(**execution)))
    print(json.dumps(values, indent=2) if as_json else text)
    return 0
