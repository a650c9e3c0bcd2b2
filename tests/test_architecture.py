"""The borders of the design, read from the source: arrows, circles, homes, forbidden calls, sizes, configs and README."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mae_core", "modalities", "pipelines")
ARROWS = {"modalities": set(), "mae_core": set(), "pipelines": {"modalities", "mae_core"}, "tests": set(PACKAGES)}
ROWS = {
    "ground": "settings nd bands masking context positions targets hog errors artefacts foreground augment attention native vit "
    "sparse_conv encoders stopping pulse watchdog file_systems launch sealed snapshot",
    "parts": "decoders mae perceptual flops heads memory chunks histogram store_files shards store_folder store_writer store_view store "
    "store_check loader optim parallel sharding full_state checkpoint checkpoint_writer divergence exhaustion black_box export "
    "weights band_transfer published monai_export bootstrap case_metrics spool system_metrics publisher lost_ranks",
    "wholes": "speed train replay evaluate segmentation labelling reconstruction probes tiling delivery registration tracking_store "
    "tracking served_model figures store_sheet case_sheet finetune",
}
HOMES = {
    "rasterio": [
        "modalities/ground.py",
        "modalities/grey_png.py",
        "modalities/cog.py",
        "modalities/raster.py",
        "modalities/raster_file.py",
        "modalities/label_raster.py",
        "modalities/label_file.py",
        "modalities/shapes.py",
        "modalities/place.py",
        "modalities/sentinel2.py",
        "modalities/resample.py",
        "modalities/samples.py",
        "modalities/tile_file.py",
        "pipelines/benchmark_ceiling.py",
    ],
    "pyogrio": ["modalities/label_file.py"],
    "nibabel": [
        "modalities/dicom_mosaic.py",
        "modalities/nifti_file.py",
        "modalities/samples.py",
        "modalities/tile_file.py",
        "pipelines/benchmark_ceiling.py",
    ],
    "pydicom": ["modalities/dicom_seg.py", "modalities/dicom_file.py", "modalities/dicom_pixels.py", "modalities/dicom_values.py"],
    "highdicom": ["modalities/dicom_seg.py"],
    "scipy": [
        "modalities/class_band.py",
        "pipelines/ground_check.py",
        "modalities/label_matrix.py",
        "modalities/hounsfield.py",
        "modalities/intensity.py",
        "modalities/spacing.py",
        "mae_core/case_metrics.py",
    ],
    "dask": ["pipelines/preparation_workers.py"],
    "distributed": ["pipelines/preparation_workers.py", "pipelines/slurm_jobs.py"],
    "dask_jobqueue": ["pipelines/slurm_jobs.py"],
    "mlflow": [
        "mae_core/delivery.py",
        "mae_core/registration.py",
        "mae_core/served_model.py",
        "mae_core/tracking.py",
        "mae_core/tracking_store.py",
    ],
    "matplotlib": ["mae_core/figures.py", "mae_core/case_sheet.py", "mae_core/store_sheet.py"],
    "zarr": ["mae_core/store_writer.py", "pipelines/benchmark_ceiling.py", "pipelines/benchmark_readers.py"],
    "numcodecs": ["mae_core/chunks.py", "pipelines/benchmark_ceiling.py"],
    "fsspec": ["mae_core/store_files.py"],
    "pyarrow": ["mae_core/store_folder.py", "mae_core/store_writer.py", "pipelines/catalogue.py"],
    "monai": ["mae_core/heads.py", "pipelines/benchmark_peers.py"],
    "transformers": ["pipelines/benchmark_peers.py"],
    "safetensors": ["mae_core/black_box.py", "mae_core/checkpoint.py", "mae_core/export.py", "mae_core/weights.py"],
    "omegaconf": ["pipelines/command_line.py", "pipelines/config_files.py"],
    "yaml": ["pipelines/command_line.py", "pipelines/config_files.py"],
    "rich": ["pipelines/"],
    "torch": ["mae_core/", "pipelines/"],
}
FORBIDDEN_LIBRARIES = {"pickle", "dill", "cloudpickle", "torchvision", "timm", "lightning", "pytorch_lightning", "hydra", "einops"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
FORBIDDEN_NAMES = {"utils", "misc", "common", "helpers", "base", "registry"}
MAX_LINES, MAX_FUNCTION_LINES = 450, 80
OWN_FOLDERS = ("mae_core", "modalities", "pipelines", "configs")


@dataclass(frozen=True)
class Source:
    """A Python file: its path in the repository, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files of some folders."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python file in {folders}"
    texts = ((file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files)
    return tuple(Source(path, text, ast.parse(text)) for path, text in texts)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, at its top, inside a function or only for types."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = source.module.split(".") if source.path.endswith("__init__.py") else source.module.split(".")[:-1]
            start = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def own_module(name: str, modules: Mapping[str, Source]) -> str | None:
    """The module of ours that an imported name lies in: `mae_core.vit.Encoder` lies in `mae_core.vit`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def graph(*folders: str) -> dict[str, dict[str, int]]:
    """Module to the modules of ours that it imports, each with a line."""
    modules = {source.module: source for source in sources(*folders)}
    edges: dict[str, dict[str, int]] = {}
    for module, source in modules.items():
        targets = ((line, own_module(name, modules)) for line, name in imports(source))
        edges[module] = {target: line for line, target in targets if target and target != module}
    return edges


def circle(edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Modules that import each other in a circle, the first once more at the end; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in edges[module]:
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := walk(module, []))), [])


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression of that spelling; empty for anything but names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def repository_files() -> list[Path]:
    """Every file that is or would be tracked by git; where git cannot tell, every file that is not hidden."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())
    tops = [entry for entry in ROOT.iterdir() if entry.name in (*PACKAGES, "tests", "configs", ".ci") or entry.is_file()]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*")) if file.is_file()]
    return sorted(file for file in files if not {"__pycache__", ".git"} & set(file.relative_to(ROOT).parts))


def report(wrong: list[str]) -> None:
    """Fails with every line at once."""
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_point_from_tests_to_pipelines_to_the_two_packages() -> None:
    wrong = []
    for source in sources(*PACKAGES, "tests"):
        allowed = ARROWS[source.package] | {source.package}
        for line, name in imports(source):
            top = name.split(".")[0]
            if top in ARROWS and top not in allowed:
                wrong.append(f"{source.path}:{line} imports {name}; {source.package} may import {sorted(ARROWS[source.package])}")
    report(wrong)


def test_every_file_of_the_core_stands_in_a_row_and_imports_no_later_row() -> None:
    rank = {name: (number, row) for number, (row, names) in enumerate(ROWS.items()) for name in names.split()}
    wrong = []
    for module, targets in graph("mae_core").items():
        name = module.removeprefix("mae_core.")
        if name == "mae_core":
            wrong += [f"mae_core/__init__.py:{line} imports {target}; it imports nothing" for target, line in targets.items()]
        elif name not in rank:
            wrong.append(f"mae_core/{name}.py stands in no row; put it into ROWS of tests/test_architecture.py (ground, parts or wholes)")
        else:
            late = [
                (target, line) for target, line in targets.items() if rank.get(target.removeprefix("mae_core."), (0, ""))[0] > rank[name][0]
            ]
            wrong += [f"mae_core/{name}.py:{line} is of the {rank[name][1]} and imports {target} of a later row" for target, line in late]
    report(wrong)


def test_no_import_circle() -> None:
    found = circle(graph(*PACKAGES))
    assert not found, " imports ".join(found)


def test_a_circle_and_an_import_of_a_package_are_seen() -> None:
    assert circle({"a": {"b": 1}, "b": {"c": 1}, "c": {"b": 1}}) == ["b", "c", "b"]
    assert circle({"a": {"b": 1, "c": 1}, "b": {"c": 1}, "c": {}}) == []
    source = Source("mae_core/x.py", "", ast.parse("from mae_core import vit\nfrom . import nd\nfrom .mae import A\nimport torch.nn as n"))
    assert [name for _, name in imports(source)] == ["mae_core.vit", "mae_core.nd", "mae_core.mae.A", "torch.nn"]
    assert own_module("mae_core.vit.Encoder", {"mae_core": source, "mae_core.vit": source}) == "mae_core.vit"


def test_heavy_libraries_stay_in_their_homes() -> None:
    wrong = []
    for source in sources(*PACKAGES):
        for line, name in imports(source):
            homes = HOMES.get(name.split(".")[0])
            if homes is not None and not source.path.startswith(tuple(homes)):
                wrong.append(f"{source.path}:{line} imports {name}; its homes are {', '.join(homes)}")
    report(wrong)


def test_nothing_forbidden_is_imported_or_called() -> None:
    wrong = []
    for source in sources(*PACKAGES, "tests"):
        # Tests may pickle what they made themselves: that a Scene can be sent to another process is a law of ours.
        forbidden = FORBIDDEN_LIBRARIES - ({"pickle"} if source.package == "tests" else set())
        wrong += [f"{source.path}:{line} imports {name}" for line, name in imports(source) if name.split(".")[0] in forbidden]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{source.path}:{node.lineno} has a bare except; name the errors")
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            pickles = any(
                word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
                for word in node.keywords
            )
            # Published checkpoints are files of torch.save; with weights_only nothing but tensors comes out of them.
            safe = source.path == "mae_core/weights.py" and name == "torch.load" and "weights_only=True" in ast.unparse(node)
            if (name in FORBIDDEN_CALLS and not safe) or pickles:
                wrong.append(f"{source.path}:{node.lineno} calls {ast.unparse(node)[:60]}")
            if name == "print" and source.package in ("mae_core", "modalities"):
                wrong.append(f"{source.path}:{node.lineno} prints; only pipelines speak to the user")
    report(wrong)


def test_files_and_functions_are_short() -> None:
    wrong = []
    for source in sources(*PACKAGES, "tests"):
        count = len(source.text.splitlines())
        if count > MAX_LINES:
            wrong.append(f"{source.path} has {count} lines; at most {MAX_LINES}")
        functions = (node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        lengths = ((node, (node.end_lineno or 0) - node.lineno + 1) for node in functions)
        long = ((node, length) for node, length in lengths if length > MAX_FUNCTION_LINES)
        wrong += [f"{source.path}:{node.lineno} {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}" for node, length in long]
    report(wrong)


def test_modules_have_names_that_say_something() -> None:
    names = {part for source in sources(*PACKAGES, "tests") for part in source.module.split(".")}
    assert not names & FORBIDDEN_NAMES
    # `python pipelines/VERB.py` puts that folder first on the path, so a file called like a standard module would replace it.
    assert not {Path(source.path).stem for source in sources("pipelines")} & sys.stdlib_module_names


def test_no_text_names_the_place_of_development() -> None:
    # Written in pieces, so that this file does not find itself.
    places = ["(?<![\\w.)])/" + "work/", "/opt/" + "pypi", "\\bfarm" + "-[a-z0-9]", "\\." + "library\\b"]
    hosts = "(index|registry|trusted|proxy|mirror|simple)[^\\n]*(" + "local" + "host|127\\.0\\.0\\.1)"
    pattern = re.compile("|".join([*places, hosts]), re.IGNORECASE)
    wrong = []
    for file in repository_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        wrong += [f"{file.relative_to(ROOT)}:{number} names {found[0]}" for number, line in lines if (found := pattern.search(line))]
    report(wrong)


def config_files() -> list[str]:
    """Every config, relative to `configs/`; `configs/cluster` holds what schedulers read, with tests of its own."""
    names = (file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*") if file.suffix in (".yaml", ".yml"))
    return sorted(name for name in names if not name.startswith("cluster/"))


def test_the_table_of_configs_lists_every_config() -> None:
    table = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\|\s*\[?`([^`]+\.(?:ya?ml|sbatch))`", table, re.MULTILINE)
    scripts = [f"cluster/{file.name}" for file in (ROOT / "configs" / "cluster").iterdir()]
    assert sorted(listed) == sorted(config_files() + scripts), (
        "each config has one row in configs/README.md, its name in backticks in the first column"
    )
    others = [file.name for file in (ROOT / "configs").rglob("*") if file.is_file() and file.suffix not in (".yaml", ".yml", ".sbatch")]
    assert others == ["README.md"], "configs/ holds YAML, job scripts and its README, no code of ours"


def header_command(text: str) -> list[str] | None:
    """Arguments of the command that a config's opening comment gives, from `pipelines/VERB.py` on; None if it gives none."""
    header = "\n".join(
        line.removeprefix("#").strip() for line in text[: re.search(r"^[^#\n]", text + "\nx", re.MULTILINE).start()].splitlines()
    )
    found = re.search(r"(?:python|torchrun)\b[^\n]*?(pipelines/\w+\.py(?:[^\n]*\\\n)*[^\n]*)", header)
    return shlex.split(found[1].replace("\\\n", " ")) if found else None


def test_every_config_is_accepted_by_the_command_in_its_header(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_files(), "no config in configs/"
    monkeypatch.chdir(ROOT)
    wrong = []
    for name in config_files():
        command = header_command((ROOT / "configs" / name).read_text(encoding="utf-8"))
        if command is None or f"configs/{name}" not in command:
            wrong.append(f"configs/{name}: its opening comment gives no `python pipelines/VERB.py --config configs/{name} ...`")
            continue
        verb = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
        if verb.main([*command[1:], "--print-config"]) != 0:
            wrong.append(f"configs/{name}: {shlex.join(command)}\n{capsys.readouterr().err}")
    report(wrong)


def test_the_command_of_a_header_is_found() -> None:
    command = "#   python pipelines/pretrain.py --config configs/a.yaml \\\n#     data=DIR\n"
    text = f"# What it is.\n{command}# not yet measured\ntrain:\n  steps: 1 # python pipelines/x.py\n"
    assert header_command(text) == ["pipelines/pretrain.py", "--config", "configs/a.yaml", "data=DIR"]
    assert header_command("# torchrun --nproc-per-node 4 pipelines/pretrain.py data=x\na: 1\n") == ["pipelines/pretrain.py", "data=x"]
    assert header_command("a: 1\n# python pipelines/x.py\n") is None


def readme() -> str:
    file = ROOT / "README.md"
    assert file.is_file(), "README.md is missing"
    return file.read_text(encoding="utf-8")


def printed_tree(text: str) -> set[str]:
    """Paths in the fenced block after the heading that contains "tree"; folders end with a slash."""
    found = re.search(r"^#+[^\n]*\btree\b[^\n]*\n(?:(?!^#).)*?^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert found, 'README.md has no fenced block after a heading with the word "tree"'
    paths: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in found[1].splitlines():
        entry = re.match(r"([\s│├└─|`+-]*)([\w.][\w.-]*/?)", line)
        if not entry:
            continue
        depth, name = len(entry[1]), entry[2]
        parents = [(place, parent) for place, parent in parents if place < depth]
        path = "".join(parent for _, parent in parents) + name
        paths.add(path)
        if name.endswith("/"):
            parents.append((depth, name))
    roots = {path.split("/")[0] for path in paths}
    return {path.partition("/")[2] for path in paths} - {""} if len(roots) == 1 and len(paths) > 1 else paths


def test_the_tree_printed_in_the_readme_is_the_real_one() -> None:
    printed = printed_tree(readme())
    files = [file.relative_to(ROOT).as_posix() for file in repository_files()]
    folders = {f"{parent.as_posix()}/" for file in files for parent in Path(file).parents if parent != Path()}
    wanted = {path for path in {*files, *folders} if "/" not in path.rstrip("/") or path.split("/")[0] in OWN_FOLDERS}
    wanted = {path for path in wanted if not re.search(r"(^\.|__init__\.py$|/py\.typed$)", path)}
    absent = [f"{path} is not in the README's tree" for path in sorted(wanted - printed)]
    report(absent + [f"{path} is in the README's tree, but not in the folder" for path in sorted(printed - {*files, *folders})])


def test_a_printed_tree_is_read_in_both_spellings() -> None:
    expected = {"pipelines/", "pipelines/prepare.py", "Makefile"}
    indented = "pipelines/        verbs\n  prepare.py    files\nMakefile\n"
    boxes = "terravox/\n├── pipelines/   verbs\n│   └── prepare.py\n└── Makefile\n"
    for block in (indented, boxes):
        assert printed_tree(f"# T\n\n## The tree\n\nText.\n\n```text\n{block}```\n") == expected


def test_no_verb_imports_a_compiler_to_answer() -> None:
    """`torch._dynamo` takes as long to import as torch itself."""
    code = "import sys, pipelines.pretrain_sentinel, pipelines.finetune_segmentation; sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_every_command_in_the_readme_answers_help() -> None:
    verbs = sorted(set(re.findall(r"\bpipelines/(\w+)\.py", readme())))
    assert verbs, "README.md names no `python pipelines/VERB.py`"

    def problem(verb: str) -> str | None:
        command = [sys.executable, f"pipelines/{verb}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        fine = done.returncode == 0 and "usage:" in done.stdout
        return None if fine else f"python pipelines/{verb}.py --help ends with {done.returncode}: {done.stderr[-500:]}"

    with ThreadPoolExecutor(2) as pool:
        report([found for found in pool.map(problem, verbs) if found])
