"""Print the Kubernetes manifest of a run: one Indexed Job, whose pods are the machines.

    python -m launch.kubernetes ... | kubectl apply -f -

The run directory lives on a volume that all pods mount. A pod that is evicted, or stops on request
with a checkpoint, is started again and does not count as a failure; the run continues.
"""

import argparse
import re
import sys
from pathlib import PurePosixPath
from typing import Any

import yaml

from launch.torchrun import EXIT_CODES, run_directory
from nmm.errors import UserError

HOME = PurePosixPath("/nmm")  # of the code in the image, see Dockerfile
PORT = 29500
USER = 1000  # the user of the image

EXAMPLES = """\
examples:
  python -m launch.kubernetes --image registry/nmm:1 --nodes 2 --gpus-per-node 8 \\
      --volume runs:/nmm/runs --volume corpora:/corpora:ro -- run.name=x data=mine
        `runs` and `corpora` are PersistentVolumeClaims; several pods write to `runs`
  kubectl delete job x        stops the run with a checkpoint; apply again to continue"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        documents = [service(options), job(options)]
    except UserError as error:
        sys.exit(f"error: {error}")
    print(yaml.safe_dump_all(documents, sort_keys=False, width=1000), end="")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.kubernetes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", required=True, help="made from our Dockerfile")
    parser.add_argument("--nodes", type=int, default=1, help="pods, one per machine (%(default)s)")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="0 trains on CPUs")
    parser.add_argument("--processes", type=int, help="per pod (as many as GPUs, at least 1)")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:/PATH[:ro]",
        help="a PersistentVolumeClaim and where to mount it; one must hold run.dir",
    )
    parser.add_argument("--namespace", help="of the cluster")
    parser.add_argument(
        "--failures", type=int, default=3, help="of the run, before it is given up (%(default)s)"
    )
    parser.add_argument(
        "--stop-seconds",
        type=int,
        default=600,
        help="that a pod may take to stop before it is killed (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    return parser.parse_args(arguments)


def service(options: argparse.Namespace) -> dict[str, Any]:
    """The names of the pods: pod 0 of job x is x-0.x."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(options),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they look for each other before they are ready
            "selector": {"app": job_name(options)},
        },
    }


def job(options: argparse.Namespace) -> dict[str, Any]:
    """A pod per machine; when the run fails all of them fail, so failures count times the pods."""
    name = job_name(options)
    ignored = [
        {
            "action": "Ignore",
            "onExitCodes": {
                "containerName": "train",
                "operator": "In",
                "values": [EXIT_CODES["stopped"]],
            },
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(options),
        "spec": {
            "completionMode": "Indexed",
            "completions": options.nodes,
            "parallelism": options.nodes,
            "backoffLimit": options.failures * options.nodes,
            "podFailurePolicy": {"rules": ignored},
            "template": {"metadata": {"labels": {"app": name}}, "spec": pod(options)},
        },
    }


def pod(options: argparse.Namespace) -> dict[str, Any]:
    claims = volumes(options)
    return {
        "subdomain": job_name(options),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.stop_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container(options)],
        "volumes": [
            # NCCL and the loader's processes pass data through shared memory; the default is 64 MB.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": claim, "persistentVolumeClaim": {"claimName": claim}}
                for claim in dict.fromkeys(claim for claim, _, _ in claims)
            ),
        ],
    }


def container(options: argparse.Namespace) -> dict[str, Any]:
    name = job_name(options)
    processes = options.processes or max(1, options.gpus_per_node)
    meeting = [f"--rendezvous={name}-0.{name}:{PORT}", "--wait-seconds=600"]
    gpus = {"limits": {"nvidia.com/gpu": options.gpus_per_node}} if options.gpus_per_node else {}
    return {
        "name": "train",
        "image": options.image,
        "workingDir": f"{HOME}",
        "command": [
            *("python", "-m", "launch.torchrun"),
            *(f"--processes={processes}", f"--nodes={options.nodes}", *meeting),
            # Kubernetes would read $(NAME) as a variable.
            *("--", *(word.replace("$(", "$$(") for word in options.overrides)),
        ],
        "resources": gpus,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *(
                {"name": claim, "mountPath": path, "readOnly": read_only}
                for claim, path, read_only in volumes(options)
            ),
        ],
    }


def metadata(options: argparse.Namespace) -> dict[str, Any]:
    namespace = {"namespace": options.namespace} if options.namespace else {}
    name = job_name(options)
    return {"name": name, **namespace, "labels": {"app": name}}


def job_name(options: argparse.Namespace) -> str:
    """The run's name, which Kubernetes must accept; raises UserError."""
    name = run_directory(options.overrides).name
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", name):
        raise UserError(
            f"run.name is {name}, which is no name for Kubernetes; give one of at most 52 small "
            f"letters, digits and hyphens that begins with a letter, for example run.name=trunk-1."
        )
    return name


def volumes(options: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """(claim, path, read only) of every --volume; raises UserError when none holds the runs."""
    found = []
    for text in options.volume:
        match = re.fullmatch(r"([-a-z0-9.]+):(/[^:]*)(:ro)?", text)
        if not match:
            raise UserError(f"--volume is {text}; give CLAIM:/PATH or CLAIM:/PATH:ro.")
        found.append((match[1], match[2], match[3] is not None))
    directory = HOME / run_directory(options.overrides)
    if not any(directory.is_relative_to(path) for _, path, read_only in found if not read_only):
        raise UserError(
            f"--volume mounts nothing that can be written at {directory.parent}, where the run "
            f"lives; give a claim that all pods share, like --volume runs:{directory.parent}."
        )
    return found


if __name__ == "__main__":
    main()
