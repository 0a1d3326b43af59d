"""`docs/scale.md` and the files beside it: one node's command runs, the others are well-formed.

The schema of a PyTorchJob is the part that the file uses of the operator's CRD (kubeflow
training-operator v1.9, manifests/base/crds), with nothing further allowed; SkyPilot's is that of
its documented task fields; Slurm's options are those of sbatch's manual.
"""

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from moebius.config import override
from moebius.recipes import recipe

from ..running import RECIPES, UNJUDGED, Place, losses
from .ranks import ROOT, environment

DOCS = ROOT / "docs"
LAUNCH = DOCS / "launch"
TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "boolean"}
TEXTS = {"type": "array", "items": TEXT}


def exactly(required: str, **fields: Any) -> dict[str, Any]:
    """An object with these fields alone; the required ones by name."""
    plain = {"type": "object", "properties": fields, "additionalProperties": False}
    return {**plain, "required": required.split()}


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


CONTAINER = exactly(
    "name image",
    # The operator's validation asks for a container of this name.
    name={"const": "pytorch"},
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    resources=exactly(
        "limits",
        limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
    ),
    volumeMounts=list_of(exactly("name mountPath", name=TEXT, mountPath=TEXT, readOnly=TRUTH)),
)
VOLUME = exactly(
    "name",
    name=TEXT,
    persistentVolumeClaim=exactly("claimName", claimName=TEXT, readOnly=TRUTH),
    emptyDir=exactly("", medium=TEXT, sizeLimit=TEXT),
)
REPLICAS = exactly(
    "template",
    replicas=WHOLE,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=exactly(
        "spec", spec=exactly("containers", containers=list_of(CONTAINER), volumes=list_of(VOLUME))
    ),
)
PYTORCHJOB = exactly(
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=exactly("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}),
    spec=exactly(
        "pytorchReplicaSpecs",
        # A text, not a number.
        nprocPerNode={"type": "string", "pattern": r"^(\d+|auto|cpu|gpu)$"},
        runPolicy=exactly("", cleanPodPolicy={"enum": ["All", "Running", "None"]}),
        elasticPolicy=exactly(
            "",
            rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            maxRestarts=WHOLE,
        ),
        pytorchReplicaSpecs=exactly("Worker", Worker=REPLICAS),
    ),
)
SKYPILOT = exactly(
    "run",
    name=TEXT,
    num_nodes=WHOLE,
    workdir=TEXT,
    resources=exactly(
        "",
        infra=TEXT,
        accelerators={"type": "string", "pattern": r"^[A-Z]+\d+(-\w+)?:\d+$"},
        job_recovery=exactly(
            "", strategy=TEXT, max_restarts_on_errors={"type": "integer", "minimum": 0}
        ),
    ),
    envs={"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    volumes={"type": "object", "additionalProperties": TEXT},
    setup=TEXT,
    run=TEXT,
)
SBATCH: dict[str, str] = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "requeue": "",
    "signal": r"([RB]+:)?[A-Z]+(@\d+)?",
    "open-mode": "append|truncate",
    "output": r"\S+",
}


def read(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / name).read_text())


def check(data: Any, schema: dict[str, Any]) -> None:
    pytest.importorskip("jsonschema").validate(data, schema)


def train_of(command: list[str]) -> list[str]:
    """What `moebius` gets of a torchrun command; its recipe exists and its overrides fit."""
    assert command[0] == "torchrun"
    own = command[command.index("moebius") + 1 :]
    assert command[command.index("moebius") - 1] == "-m" and own[0] == "train"
    assert own[-3] == "--out" and own[-1] == "--go-on"
    name, *overrides = own[1:-3]
    override(recipe("quickstart" if name.startswith("$") else name), overrides)
    return own


def torchrun_in(script: str) -> list[str]:
    """The one torchrun command of a shell script, its lines joined."""
    lines = script.replace("\\\n", " ").splitlines()
    (line,) = (x for x in lines if "torchrun" in x.split() and not x.startswith("#"))
    words = shlex.split(line)
    return words[words.index("torchrun") :]


def check_launcher(command: list[str]) -> dict[str, str]:
    """torchrun's own options of a command, as torchrun parses them."""
    options = command[1 : command.index("-m")]
    parsed = get_args_parser().parse_args([*options, "-m", "moebius"])
    return {key: str(value) for key, value in vars(parsed).items()}


def test_pytorchjob_fits_the_operators_schema() -> None:
    job = read("pytorchjob.yaml")
    check(job, PYTORCHJOB)
    spec = job["spec"]
    worker, policy = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    pod = worker["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    own = train_of([*container["command"], *container["args"]])
    assert own[-2].startswith(mounts["runs"])


def test_a_wrong_pytorchjob_does_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for path, value in (("nprocPerNode", 8), ("elasticPolicy", {"maxRestart": 3})):
        job = read("pytorchjob.yaml")
        job["spec"][path] = value
        with pytest.raises(jsonschema.ValidationError):
            check(job, PYTORCHJOB)


def test_skypilot_task_has_documented_fields() -> None:
    task = read("skypilot.yaml")
    check(task, SKYPILOT)
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = torchrun_in(task["run"])
    variables = set(re.findall(r"\$(\w+)", task["run"])) - {"HEAD"}
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert variables == given | task["envs"].keys()
    assert check_launcher(command)["max_restarts"] == "10"
    assert train_of(command)[-2].startswith(next(iter(task["volumes"])))


def test_slurm_script() -> None:
    path = LAUNCH / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(given) == text.count("#SBATCH")
    wrong = [k for k, value in given.items() if not re.fullmatch(SBATCH.get(k, "(?!)"), value)]
    assert not wrong, wrong
    # sbatch reads its options before the first command only.
    first = next(i for i, x in enumerate(text.splitlines()) if x and not x.startswith("#"))
    assert all("#SBATCH" not in line for line in text.splitlines()[first:])
    # One launcher a node, and as many processes as it has devices.
    command = torchrun_in(text)
    assert given["ntasks-per-node"] == "1"
    assert check_launcher(command)["nproc_per_node"] == given["gpus-per-node"]
    train_of(command)


def test_the_command_of_several_nodes_parses() -> None:
    text = (DOCS / "scale.md").read_text()
    block = text.split("## Several nodes")[1].split("```")[1]
    command = torchrun_in(block)
    assert check_launcher(command)["nnodes"] == "2:4"
    train_of(command)


def test_files_that_are_named_exist() -> None:
    text = (DOCS / "scale.md").read_text()
    named = set(re.findall(r"\]\((launch/[^)]+)\)", text))
    assert named == {f"launch/{path.name}" for path in LAUNCH.iterdir()}


def test_the_command_of_one_node_runs(place: Place) -> None:
    """As it stands, but for a recipe that is small."""
    text = (DOCS / "scale.md").read_text()
    command = torchrun_in(text.split("## One node")[1].split("```")[1])
    train_of(command)
    fields = place.fields(UNJUDGED, "steps=4")
    at = command.index("quickstart")
    small = [*command[1:at], f"{RECIPES}:tiny", *fields, *command[at + 1 :]]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *small],
        cwd=place.folder,
        env=environment(),
        capture_output=True,
        check=True,
    )
    assert list(losses(place.folder / "runs" / "two")) == [1, 2, 3, 4]
