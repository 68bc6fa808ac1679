"""The cluster files: Ray accepts them, they scale from zero, open no port, hold no secret, upload what jobs need.

Ray's own validation runs offline and checks the schema only. The functions here return a list of further problems. Each
is also tested on damaged copies, so a check that no longer detects anything fails.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers.running import parse_only
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).resolve().parents[2]
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|aws_secret|PRIVATE KEY|\bhf_[A-Za-z0-9]{8,}|\.pem\b|(password|secret|token)\s*[:=]\s*[^~\s]",
    re.IGNORECASE,
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def runtime_env() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "runtime_env.yaml").read_text(encoding="utf-8"))


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: group for name, group in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def scaling_problems(cluster: dict[str, Any]) -> list[str]:
    """Workers start at zero and stop when idle. Only data nodes are spot machines. The head runs no work."""
    problems = [f"{name}: min_workers" for name, group in groups(cluster).items() if group.get("min_workers", 0) != 0]
    problems += [f"{name}: max_workers" for name, group in groups(cluster).items() if group.get("max_workers", 0) < 1]
    if not 0 < cluster["idle_timeout_minutes"] <= 60:
        problems.append("idle_timeout_minutes")
    head = cluster["available_node_types"][cluster["head_node_type"]]
    if head["resources"]["CPU"] != 0 or "GPU" in head["resources"]:
        problems.append("head: runs work")
    for name, group in groups(cluster).items():
        spot = group["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        if spot == ("GPU" in group["resources"]):
            problems.append(f"{name}: {'spot' if spot else 'on demand'}")
    return problems


def opening_problems(cluster: dict[str, Any]) -> list[str]:
    """Nothing is open to the internet, and Ray creates no security group, which would allow SSH."""
    problems = [
        f"{name}: no SecurityGroupIds"
        for name, group in cluster["available_node_types"].items()
        if not group["node_config"].get("SecurityGroupIds")
    ]
    if "security_group" in cluster["provider"]:
        problems.append("provider.security_group: Ray would add rules")
    if any(anywhere in str(cluster) for anywhere in ("0.0.0.0", "::/0")):
        problems.append("an open address")
    if not any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"]):
        problems.append("the dashboard")
    if not any("RAY_AUTH_MODE=token" in command for command in cluster["setup_commands"]):
        problems.append("no token required")
    return problems


def secret_problems(cluster: dict[str, Any]) -> list[str]:
    secrets = SECRETS.findall(yaml.safe_dump(cluster))
    key_names = [name for name, group in cluster["available_node_types"].items() if "KeyName" in group["node_config"]]
    return [str(match) for match in secrets] + key_names + [key for key in cluster["auth"] if key.endswith("_key")]


def excludes_problems(runtime_env: dict[str, Any]) -> list[str]:
    """Paths that Ray's matcher, with .gitignore, wrongly excludes from the upload or includes in it."""
    ignores = [
        _get_excludes(ROOT, runtime_env["excludes"]),
        *get_excludes_from_ignore_files(ROOT, include_gitignore=True),
    ]

    def is_excluded(path: str) -> bool:
        return any(ignore(ROOT / path) for ignore in ignores)

    needed = [
        "voxray/__init__.py",
        "voxray/batches/plan.py",
        "voxray/runs/layout.py",
        "jobs/train_multitask.py",
        "jobs/configs/demo.yaml",
        "tests/assets/clips/a.wav",
        "tests/assets/data/asr.jsonl",
    ]
    unwanted = [".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "data/ASR.jsonl", "cache/x", "ckpt_mt/a.bin"]
    return [f"{path} is excluded" for path in needed if is_excluded(path)] + [
        f"{path} is uploaded" for path in unwanted if not is_excluded(path)
    ]


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_cluster_has_no_problems(cluster: dict[str, Any]) -> None:
    assert scaling_problems(cluster) == []
    assert opening_problems(cluster) == []
    assert secret_problems(cluster) == []


def test_mounted_files_exist(cluster: dict[str, Any]) -> None:
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert all((ROOT / path).is_file() for path in local), local


def test_nodes_install_the_pinned_packages(cluster: dict[str, Any]) -> None:
    mounted = {Path(path).name for path in cluster["file_mounts"].values()}
    assert {"setup.py", "constraints.txt", "pyproject.toml"} <= mounted
    assert any("tools/setup.py" in command for command in cluster["setup_commands"])


Damage = Callable[[dict[str, Any]], object]
CLUSTER_DAMAGE: list[tuple[str, Callable[[dict[str, Any]], list[str]], Damage]] = [
    ("a worker that never stops", scaling_problems, lambda c: c["available_node_types"]["data"].update(min_workers=1)),
    ("training on spot", scaling_problems, lambda c: c["available_node_types"]["train"]["node_config"].update(
        InstanceMarketOptions={"MarketType": "spot"})),
    ("data on demand", scaling_problems, lambda c: c["available_node_types"]["data"]["node_config"].pop(
        "InstanceMarketOptions")),
    ("a head that runs work", scaling_problems, lambda c: c["available_node_types"]["head"]["resources"].update(
        CPU=4)),
    ("Ray's own security group", opening_problems, lambda c: c["available_node_types"]["head"]["node_config"].pop(
        "SecurityGroupIds")),
    ("SSH from anywhere", opening_problems, lambda c: c["provider"].update(
        security_group={"IpPermissions": [{"FromPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]})),
    ("an open dashboard", opening_problems, lambda c: c.update(
        head_start_ray_commands=["ray start --head --dashboard-host=0.0.0.0"])),
    ("no token", opening_problems, lambda c: c.update(setup_commands=[])),
    ("an access key", secret_problems, lambda c: c["setup_commands"].append(
        "export AWS_ACCESS_KEY_ID=AKIA" + "A" * 16)),
    ("a token", secret_problems, lambda c: c["setup_commands"].append("export HF_TOKEN=abc")),
    ("a key file", secret_problems, lambda c: c["auth"].update(ssh_private_key="~/.ssh/mine.pem")),
    ("a named key", secret_problems, lambda c: c["available_node_types"]["data"]["node_config"].update(KeyName="mine")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "find_problems", "damage"), CLUSTER_DAMAGE, ids=[case[0] for case in CLUSTER_DAMAGE])
def test_damage_is_detected(
    name: str, find_problems: Callable[..., list[str]], damage: Damage, cluster: dict[str, Any]
) -> None:
    damage(cluster)
    assert find_problems(cluster), name


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda c: c.update(max_worker=3), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["train"]["resources"].update(GPU=0.5), jsonschema.ValidationError),
        (lambda c: c.update(head_node_type="driver"), ValueError),
    ],
    ids=["unknown key", "half a GPU", "unknown head"],
)
def test_ray_refuses_a_damaged_cluster(damage: Damage, error: type[Exception], cluster: dict[str, Any]) -> None:
    damage(cluster)
    with pytest.raises(error):
        validate_config(prepare_config(cluster))


def test_ray_accepts_the_runtime_env(runtime_env: dict[str, Any]) -> None:
    assert RuntimeEnv(**runtime_env)["working_dir"] == "."
    assert runtime_env["env_vars"] == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r["env_vars"].update(RAY_JOB_STOP_WAIT_TIME_S=30),
        lambda r: r.update(excludes="/.git/"),
        lambda r: r.update(working_dir=["."]),
    ],
    ids=["a number as environment variable", "excludes is not a list", "working_dir is not a path"],
)
def test_ray_refuses_a_damaged_runtime_env(damage: Damage, runtime_env: dict[str, Any]) -> None:
    damage(runtime_env)
    with pytest.raises(TypeError):
        RuntimeEnv(**runtime_env)


def test_the_upload_has_what_jobs_need(runtime_env: dict[str, Any]) -> None:
    assert excludes_problems(runtime_env) == []


@pytest.mark.parametrize("pattern", ["data", "tests/", "*.wav"])
def test_a_careless_pattern_is_detected(pattern: str, runtime_env: dict[str, Any]) -> None:
    runtime_env["excludes"].append(pattern)
    assert excludes_problems(runtime_env)


# -- the same cluster on Google Cloud


@pytest.fixture
def gcp() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "gcp.yaml").read_text(encoding="utf-8"))


def gcp_problems(cluster: dict[str, Any]) -> list[str]:
    """The same checks for Google Cloud: spot machines for data nodes only, and no public address."""
    problems = [f"{name}: min_workers" for name, group in groups(cluster).items() if group.get("min_workers", 0) != 0]
    for name, group in groups(cluster).items():
        is_spot = group["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        if is_spot == ("GPU" in group["resources"]):
            problems.append(f"{name}: {'spot' if is_spot else 'on demand'}")
    for name, group in cluster["available_node_types"].items():
        interfaces = group["node_config"].get("networkInterfaces", [])
        if not interfaces or any("accessConfigs" in interface for interface in interfaces):
            problems.append(f"{name}: a public address")
    if not cluster["provider"]["use_internal_ips"]:
        problems.append("provider.use_internal_ips")
    commands = str([cluster["head_start_ray_commands"], cluster["setup_commands"]])
    return problems + [part for part in ("--dashboard-host=127.0.0.1", "RAY_AUTH_MODE=token") if part not in commands]


def test_the_cluster_on_google_cloud(cluster: dict[str, Any], gcp: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(gcp)))
    assert gcp_problems(gcp) == [] and secret_problems(gcp) == []
    for name, group in cluster["available_node_types"].items():
        for key in ("resources", "min_workers", "max_workers"):
            assert group.get(key) == gcp["available_node_types"][name].get(key)
    assert all((ROOT / path).is_file() for path in gcp["file_mounts"].values() if not path.startswith("~"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["available_node_types"]["train"]["node_config"]["scheduling"].update(provisioningModel="SPOT"),
        lambda c: c["available_node_types"]["data"]["node_config"].pop("scheduling"),
        lambda c: c["available_node_types"]["head"]["node_config"]["networkInterfaces"][0].update(accessConfigs=[{}]),
        lambda c: c["available_node_types"]["head"]["node_config"].pop("networkInterfaces"),
        lambda c: c["provider"].update(use_internal_ips=False),
        lambda c: c.update(setup_commands=[]),
    ],
)
def test_damage_on_google_cloud_is_detected(damage: Damage, gcp: dict[str, Any]) -> None:
    damage(gcp)
    assert gcp_problems(gcp)


# -- one job on Kubernetes

JOB_KEYS = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode"),
    *("submitterConfig", "runtimeEnvYAML", "rayClusterSpec", "activeDeadlineSeconds", "metadata", "suspend"),
}
"""Relevant fields of KubeRay's RayJobSpec. The constants below are those of its parts."""
CLUSTER_KEYS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
HEAD_KEYS = {"serviceType", "rayStartParams", "template"}
WORKER_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
POD_KEYS = {"containers", "volumes", "tolerations", "terminationGracePeriodSeconds", "serviceAccountName"}
CONTAINER_KEYS = {"name", "image", "resources", "volumeMounts"}


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text(encoding="utf-8"))


def rayjob_problems(job: dict[str, Any]) -> list[str]:
    """Unknown fields, values of the wrong type, mounts without a volume, and public services."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    group_specs = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    problems = [f"spec.{key}" for key in set(spec) - JOB_KEYS]
    problems += [f"cluster.{key}" for key in set(cluster) - CLUSTER_KEYS]
    if (job["apiVersion"], job["kind"]) != ("ray.io/v1", "RayJob") or spec["submissionMode"] != "K8sJobMode":
        problems.append("kind")
    if cluster["headGroupSpec"]["serviceType"] != "ClusterIP":
        problems.append("the head is reachable from outside")
    if cluster.get("authOptions") != {"mode": "token"}:
        problems.append("the head is open to all pods")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        problems.append("the head runs work")
    for group in group_specs:
        name = group.get("groupName", "head")
        known = WORKER_KEYS if "groupName" in group else HEAD_KEYS
        problems += [f"{name}.{key}" for key in set(group) - known]
        if "groupName" in group and not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            problems.append(f"{name}: replicas")
        if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
            problems.append(f"{name}: rayStartParams must be strings")
        pod = group["template"]["spec"]
        problems += [f"{name}.pod.{key}" for key in set(pod) - POD_KEYS]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            problems += [f"{name}.container.{key}" for key in set(container) - CONTAINER_KEYS]
            problems += [f"{name}: no volume {mount['name']}" for mount in container["volumeMounts"]
                      if mount["name"] not in volumes]  # fmt: skip
            if container["resources"]["requests"] != container["resources"]["limits"]:
                problems.append(f"{name}: Ray counts limits, but Kubernetes grants requests")
            if not all(isinstance(value, str) for value in container["resources"]["limits"].values()):
                problems.append(f"{name}: quantities must be strings")
    return problems


def test_the_job_on_kubernetes(rayjob: dict[str, Any], runtime_env: dict[str, Any]) -> None:
    assert rayjob_problems(rayjob) == []
    assert SECRETS.findall(yaml.safe_dump(rayjob)) == []
    spec = rayjob["spec"]
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert {name: variables.pop(name) for name in runtime_env["env_vars"]} == runtime_env["env_vars"]
    RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"]))
    program, job, *flags = spec["entrypoint"].split()
    assert (program, job) == ("voxray", "train_multitask")
    settings = parse_only(job, flags)
    assert settings.num_workers == "1:4" and settings.output_dir.startswith("/mnt/shared/")
    largest = {}
    for group, name, resource in zip(
        spec["rayClusterSpec"]["workerGroupSpecs"], ("CPUS", "GPUS"), ("cpu", "nvidia.com/gpu"), strict=True
    ):
        [container] = group["template"]["spec"]["containers"]
        largest[f"VOXRAY_MAX_{name}"] = str(int(container["resources"]["limits"][resource]) * group["maxReplicas"])
    assert variables == largest
    image = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{spec['rayClusterSpec']['rayVersion']}-py312-gpu" in image
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and spec["rayClusterSpec"]["rayVersion"] == pinned[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda j: j["spec"].update(entryPoint="x"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas=9),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["template"]["spec"].update(volumes=[]),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ].update(cpu=4),
    ],
)
def test_damage_on_kubernetes_is_detected(damage: Damage, rayjob: dict[str, Any]) -> None:
    damage(rayjob)
    assert rayjob_problems(rayjob)
