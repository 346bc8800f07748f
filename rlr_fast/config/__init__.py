"""Every option once: of the model, of its training, and of how and where the work is done.

`settings` has what decides the result, `execution` what does not. May import nothing of the
package.
"""

from rlr_fast.config.execution import (
    Backend,
    Cache,
    ExecutionConfig,
    InferenceExecution,
    Precision,
    TrainExecution,
)
from rlr_fast.config.levels import (
    PER_LEVEL,
    Level,
    Window,
    level_groups,
    level_name,
    per_level,
    read_level,
    short_windows,
    window_pair,
)
from rlr_fast.config.rules import LARGEST, suggest
from rlr_fast.config.settings import (
    PRESETS,
    REFERENCE_VALUES,
    SCORE_FIELDS,
    Preset,
    RLRConfig,
    TrainConfig,
    check_branches,
    check_seed,
    from_dict,
)
from rlr_fast.config.tiles import Sides, Tiles, checked_tiles, optional_tiles

__all__ = [
    "LARGEST", "PER_LEVEL", "PRESETS", "REFERENCE_VALUES", "SCORE_FIELDS", "Backend", "Cache",
    "ExecutionConfig", "InferenceExecution", "Level", "Precision", "Preset", "RLRConfig",
    "Sides", "Tiles", "TrainConfig", "TrainExecution", "Window", "check_branches", "check_seed",
    "checked_tiles", "from_dict", "level_groups", "level_name", "optional_tiles", "per_level",
    "read_level", "short_windows", "suggest", "window_pair",
]  # fmt: skip
