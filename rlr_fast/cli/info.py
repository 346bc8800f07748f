"""``rlr-fast info``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import add_machine, add_verb, chosen_device
from rlr_fast.config import PRESETS, RLRConfig
from rlr_fast.info import describe
from rlr_fast.model import CONFIG_FILE, read_config
from rlr_fast.options import add_fields, config_from


def add_info(verbs: Any) -> None:
    """Add the verb ``info``."""
    parser = add_verb(
        verbs, "info", _info, "show versions, devices, backends, and what a configuration makes"
    )
    parser.add_argument(
        "--preset", default="paper", choices=tuple(PRESETS), help="the configuration"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="that of a run instead")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_fields(parser, RLRConfig)
    add_machine(parser)


def _info(args: argparse.Namespace) -> int:
    base: Any = PRESETS[args.preset].model
    if args.checkpoint is not None:
        base = read_config(args.checkpoint / CONFIG_FILE)
    config = config_from(args, RLRConfig, base)
    values, text = describe(config, chosen_device(args))
    print(json.dumps(values, indent=2) if args.json else text)
    return 0
