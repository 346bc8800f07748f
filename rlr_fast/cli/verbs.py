"""The verbs of the command, and the parser made of them."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import App, Group, Parameter

from rlr_fast import __version__
from rlr_fast.cli.config_file import read_flags


@dataclass(frozen=True)
class Verb:
    """A verb of the command.

    Attributes:
        name: Its words, such as ``data check``.
        function: Module in `rlr_fast.cli` and name of the function that does the work.
        help: What it does.
        more: What else its help says, at the end.
        distributed: Whether several processes under torchrun can share its work.
        less_memory: What to change where a GPU's memory is full.
        interrupted: What to add when it was interrupted.
        research: Whether it is for those who study the method.
    """

    name: str
    function: str
    help: str
    more: str = ""
    distributed: bool = False
    less_memory: str = "a smaller --batch-size or --image-size needs less"
    interrupted: str = ""
    research: bool = False

    @property
    def module(self) -> str:
        """The module of the function."""
        return "rlr_fast.cli." + self.function.partition(":")[0]


_SCORING = "a smaller --batch-size needs less, and so does --precision bf16"
_EVALUATION = f"{_SCORING}; with tiles a larger --tile or --classes"
_TRAINING = "--grad-checkpointing or a smaller --batch-size or --image-size needs less"

_ALL = (
    Verb(
        "demo",
        "demo:demo",
        "Make a synthetic data set, train a small model on it, evaluate it and write pictures: "
        "minutes on a CPU.",
    ),
    Verb(
        "data check",
        "data:check",
        "Decode every file of a data set; say what would stop a run or spoil its numbers.",
    ),
    Verb("data make", "data:make", "Make the synthetic inspection set, in the layout of MVTec-AD."),
    Verb(
        "train",
        "train:train",
        "Train one model on the normal images of all classes.",
        distributed=True,
        less_memory=_TRAINING,
        interrupted="; --resume goes on from the last written epoch, if there is one",
    ),
    Verb(
        "eval",
        "evaluate:evaluate",
        "Measure a trained model on the test images: seven metrics per class, and their means.",
        distributed=True,
        less_memory=_EVALUATION,
        interrupted="; metrics.json is written behind the last image",
    ),
    Verb(
        "calibrate",
        "calibrate:calibrate",
        "Score normal images that the model has not seen, for predict and eval to decide by.",
        less_memory=_SCORING,
    ),
    Verb(
        "predict",
        "predict:predict",
        "Score images and decide them: a table, and a heat map of each image.",
        more="Exit code 3: an image is called anomalous (with --fail-on-anomaly).",
        distributed=True,
        less_memory=_SCORING,
        interrupted="; --resume (without --report), or --watch again, goes on behind the last one",
    ),
    Verb(
        "publish",
        "publish:publish",
        "Publish a run on the Hugging Face hub: its checkpoint, calibration, and a card about it.",
    ),
    Verb(
        "export",
        "export:export",
        "Write a trained model as a file for ONNX Runtime, OpenVINO or PyTorch alone, if they "
        "agree with it.",
    ),
    Verb(
        "info",
        "info:info",
        "Show versions, devices and backends; with a preset, a run or settings, the model they "
        "give.",
    ),
    Verb(
        "decoder train",
        "decoder:train",
        "Train a decoder, which paints features as pictures for figures.",
        research=True,
    ),
    Verb(
        "figures",
        "figures:figures",
        "Make reconstructed features visible: a sheet per class, of one run or of two side by "
        "side.",
        less_memory="a smaller --per-defect needs less",
        research=True,
    ),
    Verb(
        "paper",
        "paper:paper",
        "Train and measure all rows of a table of the paper, beside its figures; the same command "
        "goes on where it was stopped.",
        more="Table 1 is the model itself on MVTec-AD, and 2 on VisA. The others, on MVTec-AD, "
        "vary the components of a block (3), the stages of the backbone (4), the weight alpha of "
        "LCA (5), the fusion of MLKA and LCA (S1), the number of learnable references (S2), the "
        "windows of the stages (windows), and the perturbation of the features in training "
        "(perturbation).",
        less_memory=_TRAINING,
        interrupted="; the same command goes on from the last written epoch",
        research=True,
    ),
)
VERBS = {tuple(verb.name.split()): verb for verb in _ALL}
GROUPS = {
    "data": "Check a data set, or make a synthetic one.",
    "decoder": "Train a decoder, which paints features as pictures for figures.",
}


def build_app() -> App:
    """Return the command with all its verbs, whose modules are loaded when they are called."""
    app = App(
        name="rlr-fast",
        help="Multi-class anomaly detection with a learnable reference (RLR): train one model on "
        "normal images of many product classes, evaluate it, predict with it.",
        usage="rlr-fast VERB [OPTIONS]",
        help_epilogue="rlr-fast VERB --help explains each. A data set is read as it is: MVTec-AD, "
        "MPDD, VisA, MVTec LOCO, BTAD, or folders of images.",
        help_format="plaintext",
        version=f"rlr-fast {__version__}",
        version_flags="--version",
        group_commands=Group("Verbs", sort_key=0),
        group_parameters=Group("Options", sort_key=0),
        config=read_flags,
        default_parameter=Parameter(consume_multiple=(1, None), negative_iterable=()),
    )
    apps = {"": app}
    research = Group("Verbs for research", sort_key=1)
    for place, verb in enumerate(VERBS.values()):
        group, _, name = verb.name.rpartition(" ")
        if group not in apps:
            apps[group] = App(
                name=group,
                help=GROUPS[group],
                help_epilogue="",
                sort_key=place,
                group=research if verb.research else None,
            )
            app.command(apps[group])
        apps[group].command(
            f"rlr_fast.cli.{verb.function}",
            name=name,
            help=verb.help,
            help_epilogue=verb.more,
            sort_key=place,
            group=research if verb.research and not group else None,
        )
    return app
