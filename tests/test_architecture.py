"""The house rules of CONTRIBUTING.md, held over the source text of the package.

Every rule is a function from source text to a list of complaints, so that it can be shown to complain.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import import_utils

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "efficientsam_hf"
# The command is a package beside the package, so that its help need not wait for torch.
COMMAND = "efficientsam_cli"
FILES = sorted(PACKAGE.parent.rglob("*.py"))
HUB_FILES = sorted(PACKAGE.glob("*_efficientsam*.py"))

# A room is the first part of a file's path in the package: `data/sa1b.py` and `data/__init__.py` live in `data`.
FLOORS = [
    {
        "configuration_efficientsam",
        "edges_efficientsam",
        "masks_efficientsam",
        "loss_efficientsam",
        "pictures_efficientsam",
        "prompts_efficientsam",
        "tiled_decoding_efficientsam",
        "written_files",
        "cpu_threads",
        "cuda_graphs",
        "mask_settings",
        "networks",
    },
    {
        "configuration_efficientsam_sami",
        "image_processing_efficientsam",
        "mask_drawing",
        "zooming",
        "interchange",
    },
    {"processing_efficientsam", "modeling_efficientsam", "visualization"},
    {
        "modeling_efficientsam_sami",
        "modeling_efficientsam_backbone",
        "conversion",
        "efficientnet",
        "prediction",
        "mask_search",
        "exported",
        "compilation",
        "data",
    },
    {"mask_generation", "hub", "export", "prediction_stream", "training", "evaluation", "labelling"},
    {"interaction", "publishing"},
    {COMMAND},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Below it, and still not for it: a dataset that knew the model could be used with no other.
FORBIDDEN = {"data": {"modeling_efficientsam"}}

HUB_PACKAGES = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
DRAWERS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
LONGEST_FUNCTION = 60
LONGEST_FILE = 320


def imported_modules(source: str, module: str) -> list[tuple[str, int]]:
    """Every module that the text of `module` (dotted, from the package's own name on) may import, and in which line.

    `from a import b` counts as `a.b` too, because `b` may be a module; relative imports are resolved.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found += [(f"{origin}.{alias.name}", node.lineno) for alias in node.names]
    return found


def floor_complaints(source: str, path: str) -> list[str]:
    """`path` is the file's place in the package, such as `data/sa1b.py`."""
    *folders, name = Path(path).with_suffix("").parts
    # A folder's `__init__` counts as a file in it, so that one dot means the folder itself.
    module = ".".join([PACKAGE.name, *folders, name])
    room = (folders or [name])[0]
    if room != "__init__" and room not in FLOOR:
        return [f"{path}: the room {room!r} is on no floor; give it one in FLOORS and in CONTRIBUTING.md"]
    complaints = []
    for target, line in imported_modules(source, module):
        top, *rest = target.split(".")
        if top == COMMAND and room != COMMAND:
            complaints.append(f"{path}:{line} imports the command line")
        if top != PACKAGE.name or not rest:
            continue
        wanted = rest[0]
        if wanted not in FLOOR:
            if len(rest) > 1:
                complaints.append(f"{path}:{line} imports {wanted!r}, which is on no floor")
            elif room not in ("__init__", COMMAND):
                complaints.append(f"{path}:{line} imports {wanted!r} from the package, not from the room it lives in")
        elif room == "__init__":
            continue
        elif wanted in FORBIDDEN.get(room, ()):
            complaints.append(f"{path}:{line} {room!r} does without {wanted!r}: a model arrives as an argument")
        elif wanted != room and FLOOR[wanted] >= FLOOR[room]:
            complaints.append(f"{path}:{line} floor {FLOOR[room]} reaches up to {wanted!r} on floor {FLOOR[wanted]}")
    return complaints


def front_door_complaints(source: str, path: str) -> list[str]:
    """The package's `__init__` gives names and registers classes: it imports only this package and transformers."""
    return [
        f"{path}:{line} imports {target}, and the front door gives names of the package"
        for target, line in imported_modules(source, f"{PACKAGE.name}.__init__")
        if target.split(".")[0] not in {PACKAGE.name, "transformers", "importlib", "typing"}
    ]


def guarded_lines(tree: ast.AST) -> set[int]:
    """Lines inside `try:` or `if is_x_available():` of transformers, where the Hub's importer asks for no package."""
    guarded: set[int] = set()
    for node in ast.walk(tree):
        asked = re.match(r"(is_\w+_available)\(", ast.unparse(node.test)) if isinstance(node, ast.If) else None
        asks = asked is not None and hasattr(import_utils, asked[1])
        if isinstance(node, ast.Try) or asks:
            body = [*node.body, *(node.handlers if isinstance(node, ast.Try) else [])]
            guarded |= {line for part in body for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    return guarded


def hub_siblings_complaints(source: str, path: str) -> list[str]:
    """Siblings are imported one way only: any other is lost when the file is saved, or found only on our machines."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
            complaints += [f"{path}:{node.lineno} imports {name} by the package's name" for name in ours]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == PACKAGE.name:
            complaints.append(f"{path}:{node.lineno} imports {node.module} by the package's name")
        elif isinstance(node, ast.ImportFrom) and node.level:
            if not node.module:
                complaints.append(f"{path}:{node.lineno} `from . import` is saved without what it imports")
            elif node.level > 1 or not re.fullmatch(r"\w+_efficientsam(_\w+)?", node.module):
                complaints.append(f"{path}:{node.lineno} imports {node.module!r}, which does not travel")
    return complaints


def hub_prose_complaints(source: str, path: str) -> list[str]:
    """The Hub looks for siblings with a regular expression that reads strings as if they were code."""
    code = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    return [
        f"{path}:{line} a string's line looks like the import of a sibling"
        for line, text in enumerate(source.splitlines(), start=1)
        if line not in code and re.match(r"\s*(from\s+\.\S+\s+import|import\s+\.\S+)", text)
    ]


def hub_package_complaints(source: str, path: str) -> list[str]:
    """The Hub's importer refuses to load a file, function bodies included, until every package it names is there."""
    guarded = guarded_lines(ast.parse(source))
    return [
        f"{path}:{line} imports {target}, which a user of the model may not have"
        for target, line in imported_modules(source, f"{PACKAGE.name}.module")
        if target.split(".")[0] not in HUB_PACKAGES | {PACKAGE.name} and line not in guarded
    ]


def hub_config_complaints(source: str, path: str) -> list[str]:
    """Each file set gets a copy of the config class of its own, and a copy is no instance of the other."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"isinstance", "issubclass"}
            and len(node.args) == 2
        ):
            named = re.findall(r"\bEfficientSam\w*Config\b", ast.unparse(node.args[1]))
            complaints += [f"{path}:{node.lineno} asks for an instance of {name}" for name in named]
    return complaints


def name_complaints(source: str, path: str) -> list[str]:
    """A file is named after what it gives."""
    words = {word for part in Path(path).with_suffix("").parts for word in part.lower().split("_")}
    return [f"{path}: {word!r} is a drawer, not a name" for word in sorted(words & DRAWERS)]


def assert_complaints(source: str, path: str) -> list[str]:
    """What a caller can get wrong is raised: `python -O` drops asserts."""
    return [f"{path}:{n.lineno} asserts" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert)]


def function_length_complaints(source: str, path: str) -> list[str]:
    """Lines from `def` to the end, the docstring left out."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= node.body[0].end_lineno - node.body[0].lineno + 1
        if length > LONGEST_FUNCTION:
            complaints.append(f"{path}:{node.lineno} {node.name} has {length} lines, at most {LONGEST_FUNCTION}")
    return complaints


def file_length_complaints(source: str, path: str) -> list[str]:
    """The model is one file because that is what its readers come for; the others stay small."""
    length = len(source.splitlines())
    too_long = length > LONGEST_FILE and not Path(path).name.startswith("modeling_")
    return [f"{path} has {length} lines, at most {LONGEST_FILE}"] if too_long else []


Rule = Callable[[str, str], list[str]]
RULES: list[Rule] = [
    floor_complaints,
    name_complaints,
    assert_complaints,
    function_length_complaints,
    file_length_complaints,
]
HUB_RULES: list[Rule] = [hub_siblings_complaints, hub_prose_complaints, hub_package_complaints, hub_config_complaints]


def place(path: Path) -> str:
    return (path.relative_to(PACKAGE) if PACKAGE in path.parents else path.relative_to(PACKAGE.parent)).as_posix()


def complaints_of(rule: Rule, files: list[Path]) -> list[str]:
    return [complaint for path in files for complaint in rule(path.read_text(encoding="utf-8"), place(path))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule):
    assert FILES
    assert complaints_of(rule, FILES) == []


@pytest.mark.parametrize("rule", HUB_RULES, ids=lambda rule: rule.__name__)
def test_hub_files_keep(rule: Rule):
    assert HUB_FILES
    assert complaints_of(rule, HUB_FILES) == []


def test_front_door_only_gives_names():
    assert complaints_of(front_door_complaints, [PACKAGE / "__init__.py"]) == []


def test_import_needs_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import efficientsam_hf; print(efficientsam_hf.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == PACKAGE / "__init__.py"


def test_contributing_says_the_same():
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| \d \|(.*)$", text, flags=re.MULTILINE)]
    assert table == FLOORS
    own = {name for name, value in globals().items() if callable(value)}
    named = set(re.findall(r"\b(?:test_(?!\w+\.py)\w+|\w+_complaints)\b", text))
    assert named
    assert named <= own


# --------------------------------------------------------------------------------------------------------------------
# Every rule above can fail

GUILTY = [
    (floor_complaints, "masks_efficientsam.py", "from .modeling_efficientsam import EfficientSamModel"),
    (floor_complaints, "masks_efficientsam.py", "from .configuration_efficientsam import VARIANTS"),
    (floor_complaints, "data/sa1b.py", "def f():\n    from ..training.prompts import click"),
    (floor_complaints, "data/sa1b.py", "from .. import training"),
    (floor_complaints, "data/sa1b.py", "from ..modeling_efficientsam import EfficientSamModel"),
    (floor_complaints, "data/__init__.py", "from ..training import prompts"),
    (floor_complaints, "training/finetuning.py", "import efficientsam_hf.evaluation.metrics"),
    (floor_complaints, "evaluation/coco_ap.py", "from efficientsam_hf.training import losses"),
    (floor_complaints, "hub.py", "from efficientsam_cli import app"),
    (floor_complaints, "hub.py", "from efficientsam_hf import EfficientSamModel"),
    (floor_complaints, "__init__.py", "def f():\n    import efficientsam_cli"),
    (floor_complaints, "attic.py", "import torch"),
    (floor_complaints, "attic/box.py", "import torch"),
    (floor_complaints, "hub.py", "from .attic import box"),
    (front_door_complaints, "__init__.py", "import torchvision"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from . import loss_efficientsam"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from efficientsam_hf.loss_efficientsam import dice_loss"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from efficientsam_hf import EfficientSamModel"),
    (hub_siblings_complaints, "masks_efficientsam.py", "def f():\n    import efficientsam_hf.hub"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from .conversion import convert"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from .data.sa1b import Shards"),
    (hub_siblings_complaints, "masks_efficientsam.py", "from ..masks_efficientsam import nms"),
    (hub_prose_complaints, "masks_efficientsam.py", '"""Use it so:\n\n    from .ops import nms\n"""'),
    (hub_package_complaints, "masks_efficientsam.py", "def f():\n    import torchvision.ops"),
    (hub_package_complaints, "masks_efficientsam.py", "from pycocotools import mask"),
    (hub_package_complaints, "masks_efficientsam.py", "if is_our_own_thing_available():\n    import cv2"),
    (hub_package_complaints, "masks_efficientsam.py", "if is_vision_available():\n    pass\nelse:\n    import cv2"),
    (hub_config_complaints, "masks_efficientsam.py", "isinstance(config, EfficientSamConfig)"),
    (hub_config_complaints, "masks_efficientsam.py", "isinstance(c, (dict, module.EfficientSamVisionConfig))"),
    (name_complaints, "utils.py", ""),
    (name_complaints, "training/mask_helpers.py", ""),
    (name_complaints, "common/boxes.py", ""),
    (assert_complaints, "hub.py", "def f(x):\n    assert x"),
    (function_length_complaints, "hub.py", "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (file_length_complaints, "hub.py", "x = 1\n" * (LONGEST_FILE + 1)),
]

INNOCENT = [
    (floor_complaints, "modeling_efficientsam.py", "from .configuration_efficientsam import EfficientSamConfig"),
    (floor_complaints, "data/sa1b.py", "from .images import read\nfrom ..masks_efficientsam import decode_rle"),
    (
        floor_complaints,
        "efficientsam_cli/segmenting.py",
        "def f():\n    from efficientsam_hf.prediction import segment",
    ),
    (floor_complaints, "efficientsam_cli/weights.py", "from efficientsam_hf import EfficientSamModel"),
    (floor_complaints, "__init__.py", "from .modeling_efficientsam import EfficientSamModel"),
    (front_door_complaints, "__init__.py", "from transformers import AutoModel\nfrom .hub import push"),
    (hub_siblings_complaints, "modeling_efficientsam_sami.py", "from .modeling_efficientsam import EfficientSamModel"),
    (hub_prose_complaints, "masks_efficientsam.py", "def f():\n    from .loss_efficientsam import dice_loss"),
    (hub_package_complaints, "masks_efficientsam.py", "import math\nfrom torch import nn\nfrom PIL import Image"),
    (hub_package_complaints, "masks_efficientsam.py", "try:\n    import scipy\nexcept ImportError:\n    scipy = None"),
    (hub_package_complaints, "masks_efficientsam.py", "if is_torchvision_available():\n    import torchvision"),
    (hub_config_complaints, "masks_efficientsam.py", "isinstance(config, (dict, PreTrainedConfig))"),
    (name_complaints, "evaluation/metrics.py", ""),
    (function_length_complaints, "hub.py", 'def f():\n    """' + "Long.\n" * 90 + '"""\n' + "    x = 1\n" * 50),
    (file_length_complaints, "modeling_efficientsam.py", "x = 1\n" * (LONGEST_FILE + 1)),
]


def names(cases: list[tuple[Rule, str, str]]) -> list[str]:
    return [f"{rule.__name__}-{path}" for rule, path, _ in cases]


@pytest.mark.parametrize(("rule", "path", "source"), GUILTY, ids=names(GUILTY))
def test_rule_complains(rule: Rule, path: str, source: str):
    complaints = rule(source, path)
    assert complaints
    assert all(path in complaint for complaint in complaints)


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT, ids=names(INNOCENT))
def test_rule_is_silent(rule: Rule, path: str, source: str):
    assert rule(source, path) == []


def test_every_rule_has_been_seen_to_complain():
    assert {*RULES, *HUB_RULES, front_door_complaints} == {rule for rule, _, _ in GUILTY}
