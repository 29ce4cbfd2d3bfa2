"""The command line: `famba <command>`; `--help` lists the commands, `<command> --help` its options.

An error that a user can mend is one line on stderr and exit status 1. Anything else is a defect and keeps its
traceback. Each command imports what it needs, so that reading parameters does not wait for torch, and
a machine with torch alone can be checked.
"""

import argparse
import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import famba
from famba import gpu_check, supervision
from famba.errors import FambaError, InputError
from famba.storage.files import json_bytes, write_atomic

_RANGES = {"jobs": (1, 1000), "seed": (0, 2**32 - 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    Args:
        arguments: None takes those of this process, which then answers SIGTERM, and exits when a supervising
            process dies (`supervision.start`).
    """
    options = _parser().parse_args(arguments)
    try:
        if arguments is None:
            supervision.start()
        for name, (least, most) in _RANGES.items():
            value = getattr(options, name, None)
            if value is not None and not least <= value <= most:
                raise InputError(f"--{name}: {value}; must be {least} to {most}")
        return options.run(options) or 0  # gpu-check has a status of its own
    except FambaError as error:
        print(f"famba: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if not options.extra:
            raise
        print(f"famba: {error.name} is not installed: pip install 'famba[{options.extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except supervision.Terminated as end:
        _say(end.reason)
        return 143


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="famba", description="Vision Mamba with token fusion.")
    parser.add_argument("--version", action="version", version=f"famba {famba.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, summary: str, extra: str = "") -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run, extra=extra)
        return sub.add_argument

    add = command("train", _train, "train one strategy with one seed, and write the run")
    what = commands.choices["train"].add_mutually_exclusive_group()
    what.add_argument("--strategy", help="one of params.yaml's, under fusion; the one that --set gives, or none")
    what.add_argument(
        "--resolved", type=Path, metavar="FILE", help="or all parameters, as a run's params.json has them"
    )
    add("--profile", help="one of params.yaml's; the one that it names itself if not given")
    add("--processes", type=int, help="train together, each on its device; instead of train.processes")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="instead of params.yaml's: train.epochs=3")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of the run; build/runs/<strategy>-<seed> if not given")
    add("--force", action="store_true", help="replace a run that is in that folder")
    add("--keep-checkpoints", action="store_true", help="do not remove them when the run is written")

    add = command("sweep", _sweep, "train all runs of a stage as jobs of a cluster; those that are finished are kept")
    add("stage", nargs="?", default="train", choices=("train", "ablation"))
    add("--profile", help="one of params.yaml's; the one that it names itself if not given")
    add("--cluster", default="local", choices=("local", "slurm"))
    add("--jobs", type=int, help="at the same time; if not given, 1 on this machine, all on Slurm")
    said = "a parameter of submitit's Slurm executor, such as time 240 (minutes, the default) or partition gpu"
    add("--slurm", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=said)

    add = command(
        "ablation", _ablation, "train what is missing of an ablation's runs, and record what they found", "plots"
    )
    add("name", help="one of params.yaml's, under ablation")
    add("--profile", help="of one that names none; the one that params.yaml names if not given")
    add("--jobs", type=int, default=2, help="runs trained at the same time, each on one thread")

    add = command("recheck", _recheck, "train recorded runs again: does changed code still train the same?", "plots")
    said = "an ablation, of which each variant is trained with the first seed, or ablation:variant"
    add("names", nargs="+", metavar="name", help=said)
    add("--jobs", type=int, default=2, help="runs trained at the same time, each on one thread")

    add = command("resolve", _resolve, "write what the pipeline's stages depend on: parameters, and digests of code")
    add("--out", type=Path, required=True, help="folder for params/<strategy>.json, code/<notebook>.json")
    add("--ablation", metavar="NAME", help="write the parameters of one ablation instead; --out is a file")

    add = command("notebook", _notebook, "execute a notebook with parameters; an unknown one is an error", "notebooks")
    add("notebook", type=Path)
    add("output", type=Path, help="the executed copy")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="given")

    command("doctor", _doctor, "check the environment: which backends work, why not, and how to fix it")

    add = command(
        "estimate", _estimate, "estimate the time of the sweep on this device from a few training steps", "plots"
    )
    add("--profile", help="one of params.yaml's; the one that it names itself if not given")
    add("--steps", type=int, default=20, help="timed for each strategy, at least 2")
    add("--images", type=int, default=45_000, help="of an epoch")
    add("--device", help="instead of the profile's")

    command("readme", _readme, "write the tables of README.md and docs/results.md from results/", "plots")

    add = command("crate", _crate, "write the results with their provenance as a Workflow Run RO-Crate", "dev")
    add("--out", type=Path, required=True, help="folder, new or empty")

    add = command("bench", _bench, "measure scans, training steps and fusion on an idle machine", "plots")
    add("parts", nargs="*", metavar="part", help="scan, model, fusion, memory, precision, data; all if none is given")
    add("--gpu", action="store_true", help="the benchmark of a GPU, with the parts scan, steps, fusion, graphs")
    add("--device", help="with --gpu: cuda, the default, or cuda:N; cpu with --quick")
    add("--quick", action="store_true", help="small sizes that take seconds, to see that it works")
    add("--json", type=Path, help="write the result there; a full one goes to results/ by default, drawn in figures/")

    add = command(
        "gpu-check", _gpu_check, "check and measure everything that famba does on a GPU: at most eight minutes"
    )
    add("checks", nargs="*", metavar="check", help=f"{', '.join(gpu_check.CHECKS)}; all if none is given")
    add("--device", default="cuda", help="cuda, cuda:N; cpu with --quick")
    add("--quick", action="store_true", help="small sizes, to see that it works")
    add("--json", type=Path, help=f"write the result there; a full one goes to {gpu_check.PATH} by default")
    add("--wheels", type=Path, help=f"folder of packages that are not installed; {gpu_check.WHEELS}")
    return parser


def _train(options: argparse.Namespace) -> None:
    from famba import config

    if options.resolved is not None:
        for name in ("profile", "processes", "set"):
            if value := getattr(options, name):
                raise InputError(f"--{name}: {value!r}: not allowed with --resolved, which says it already")
        p = config.read_resolved(options.resolved.absolute())
    else:
        given = config.parse_settings(options.set)
        named = sorted({key.split(".")[1] for key in given if key.startswith("fusion.")})
        if len(named) > 1 and options.strategy is None:
            raise InputError(f"--strategy: missing; --set changes {', '.join(named)}, and one of them is trained")
        strategy = options.strategy or (named or ["none"])[0]
        p = config.load(options.profile, strategy=strategy, processes=options.processes, given=given)
    from famba.experiments import sweep
    from famba.storage import runs

    sweep.check_schedules({p.strategy: p})
    out = (options.out or config.root() / "build" / "runs" / runs.run_name(p.strategy, options.seed)).absolute()
    names = {path.name for path in out.glob("[!.]*")}
    unfinished = "history.csv" in names and "metrics.json" not in names  # the first and the last that is written
    if not options.force and (names or out.is_file()) and not unfinished:
        raise InputError(f"--out: {out} exists; name another folder, or --force to replace the run in it")
    if foreign := sorted(names - runs.FILES):
        raise InputError(f"--out: {out} holds {foreign[0]}, which is no file of a run; name another folder")
    from famba.training import distributed, fit

    logging.basicConfig(format="%(message)s")
    logging.getLogger("famba").setLevel(logging.INFO)
    with runs.held(out) if distributed.writes() else contextlib.nullcontext():
        run = fit.fit(p, seed=options.seed, progress=sys.stderr.isatty())
        if distributed.writes():
            command = run.cost["command"] + "".join(f" --set {shlex.quote(setting)}" for setting in options.set)
            cost = {**run.cost, "command": command}
            folder = runs.write(dataclasses.replace(run, cost=cost), out)
            print(
                f"{folder}: top-1 {run.metrics['top1_percent']:.1f} %, training {cost['train_time_s']:.1f} s, "
                f"peak memory {cost['peak_memory_mib']:.1f} MiB"
            )
    if distributed.writes() and not options.keep_checkpoints:
        fit.forget(p, seed=options.seed)


def _sweep(options: argparse.Namespace) -> None:
    from famba import config
    from famba.experiments import cluster

    logging.basicConfig(format="%(message)s")
    logging.getLogger("famba").setLevel(logging.INFO)
    slurm = {name: config.parse_value(name, text) for name, text in options.slurm}
    where = {"profile": options.profile, "cluster": options.cluster, "jobs": options.jobs}
    print(cluster.train(options.stage, **where, slurm=slurm))


def _ablation(options: argparse.Namespace) -> None:
    from famba.experiments import ablations

    print(ablations.make(options.name, profile=options.profile, jobs=options.jobs))


def _recheck(options: argparse.Namespace) -> None:
    from famba.experiments import recheck

    print(recheck.recheck(options.names, jobs=options.jobs))


def _resolve(options: argparse.Namespace) -> None:
    from famba import config
    from famba.experiments import sweep
    from famba.storage import provenance

    if options.ablation is not None:
        write_atomic(options.out, json_bytes(sweep.resolve_ablation(options.ablation)))
        return
    for p in sweep.resolve(None):
        write_atomic(options.out / "params" / f"{p.strategy}.json", json_bytes(p.as_dict()))
    for notebook in sorted((config.root() / "notebooks").glob("*.ipynb")):
        write_atomic(options.out / "code" / f"{notebook.stem}.json", json_bytes(provenance.of_notebook(notebook)))
    code = {"digest": provenance.of_module("famba.experiments.ablations")}
    write_atomic(options.out / "code" / "records.json", json_bytes(code))


def _notebook(options: argparse.Namespace) -> None:
    from famba import notebook

    notebook.execute(options.notebook, options.output, dict(options.given))


def _doctor(options: argparse.Namespace) -> None:
    from famba import diagnostics

    print(diagnostics.text(diagnostics.doctor()))


def _estimate(options: argparse.Namespace) -> None:
    from famba.bench import estimate

    rows = estimate.estimate(options.profile, steps=options.steps, images=options.images, device=options.device)
    print(estimate.text(rows))


def _readme(options: argparse.Namespace) -> None:
    from famba.analysis import summary

    summary.update_readme()


def _crate(options: argparse.Namespace) -> None:
    from famba.analysis import crate

    crate.write(options.out)


def _bench(options: argparse.Namespace) -> None:
    from famba import bench

    if options.device and not options.gpu:
        raise InputError(f"--device: {options.device!r}; allowed with --gpu only")
    device = options.device or "cuda"
    bench.main(options.parts, quick=options.quick, on_gpu=options.gpu, device=device, path=options.json)


def _gpu_check(options: argparse.Namespace) -> int:
    wheels = options.wheels or gpu_check.ROOT / gpu_check.WHEELS
    return gpu_check.main(options.checks, device=options.device, quick=options.quick, json=options.json, wheels=wheels)


def _say(why: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        print(f"famba: {why}", file=sys.stderr)
