"""One part of `accelerator.sh`: measures it on this machine's devices and writes its JSON file.

    python benchmarks/accelerator.py (kernels | step | prefill | memory | specialize) --out=FILE [--tiny]

The file is written after every figure, so that a part which exceeds its time limit leaves what it has measured. Keys:
`part`, `status` ("running", "done" or "skipped"), `reason`, `device`, `devices`, `jax`, `tiny`, `seconds`, `rows`.
Training steps and prefills have the shape of LLaVA-OneVision-0.5B, random weights and bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llava_ov_0p5b.py"
VISUAL, TILES, TEXT = 7290, 16, 512  # of one training sample: a large page
ROUNDS = 5


@dataclass
class Report:
    """A part's file. Rows are written as they are added."""

    part: str
    out: Path
    tiny: bool
    limit: float = 3600.0
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def has_time(self, seconds: float, case: str) -> bool:
        """Whether that many seconds are left until the limit; if not, adds to the file that `case` is left out."""
        if time.perf_counter() - self.began + seconds < self.limit:
            return True
        self.facts["left_out"] = [*self.facts.get("left_out", []), case]
        return False

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, prints it and writes the file."""
        self.rows.append(row)
        print(f"{self.part}: {row}", flush=True)
        self.write("running")

    def write(self, status: str, reason: str = "") -> None:
        """Writes the file."""
        seconds = round(time.perf_counter() - self.began, 1)
        head = {"part": self.part, "status": status, "reason": reason, **self.facts, "tiny": self.tiny}
        harness.save({**head, "seconds": seconds, "rows": self.rows}, self.out)


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernels(report: Report) -> None:
    """Attention against cuDNN (GPU) or splash (TPU): error against the float32 reference, then seconds.

    Ours and the baseline come first, for every shape; then the other implementations.
    """
    import attention
    import jax

    names = {
        "gpu": ("cudnn", "pallas_gpu", "tokamax", "xla_chunked"),
        "tpu": ("splash", "pallas_tpu", "tokamax", "xla_chunked"),
    }.get(jax.default_backend(), ("xla", "xla_chunked"))
    shapes = {name: attention.GPU_SHAPES[name] for name in ("0.5B joint", "7B joint", "0.5B cross", "7B cross")}
    for chosen in (names[:2], (names[0], *names[2:])):
        for name, shape in shapes.items():
            if chosen != names[:1] and report.has_time(30.0, f"{name}, {' and '.join(chosen[1:])}"):
                kernel_errors(report, name, shape._replace(batch=1).shrunk(128 if report.tiny else 8), chosen)
                kernel_seconds(report, name, shape.shrunk(128 if report.tiny else 1), chosen)


def kernel_seconds(report: Report, name: str, shape: Any, names: Sequence[str]) -> None:
    """Adds the seconds of every implementation, and its speed relative to the first one, which is the baseline."""
    import attention

    for kind, work in (("forward", 1.0), ("forward and backward", 3.5)):
        timed = partial(attention.jax_run, shape=shape, dtype=kernel_dtype(), gradients=work > 1)
        runs, absent = compiled_runs(names, timed)
        for other, reason in absent.items():
            report.add({"case": f"{name}, {kind}", "implementation": other, "absent": reason})
        seconds = attention.interleaved(runs, 2 if report.tiny else ROUNDS)
        for other, row in attention.summary(seconds, work * shape.flops).items() if seconds else ():
            facts = {"seconds": row["seconds"]["median"], "tflops_per_second": row["tflops_per_second"]}
            if names[0] in seconds:
                facts |= {"baseline": names[0], "speed": float(np.median(seconds[names[0]] / seconds[other]))}
            report.add({"case": f"{name}, {kind}", "implementation": other, **facts})


def kernel_dtype() -> Any:
    """Returns bfloat16, on a CPU float32."""
    import jax
    import jax.numpy as jnp

    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def compiled_runs(
    names: Sequence[str], make: Callable[[Any], harness.Run]
) -> tuple[dict[str, harness.Run], dict[str, str]]:
    """Returns the implementations that compile and run once, and for each other one the reason why it does not."""
    runs: dict[str, harness.Run] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            runs[name] = make(name)
            harness.wait(runs[name]())
        except Exception as error:  # a library that fails must not stop the others
            runs.pop(name, None)
            absent[name] = f"{type(error).__name__}: {error}"[:300]
    return runs, absent


def kernel_errors(report: Report, name: str, shape: Any, names: Sequence[str]) -> None:
    """Adds each implementation's largest difference from the reference in float32, relative to its largest value."""
    import attention
    import jax.numpy as jnp

    for gradients in (False, True):
        make = partial(attention.jax_run, shape=shape, gradients=gradients)
        expected = make("xla", dtype=jnp.float32)()
        runs, _ = compiled_runs(names, partial(make, dtype=kernel_dtype()))
        for other, run in runs.items():
            pairs = zip(_leaves(run()), _leaves(expected), strict=True)
            error = max(float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in pairs)
            kind = "gradients" if gradients else "output"
            report.add({"case": f"{name}, {kind}", "implementation": other, "relative_error": error})


def _leaves(tree: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]


# --- the training step ------------------------------------------------------------------------------------------------


@dataclass
class TrainingStep:
    """The compiled step of the stage full, with its state and one batch on the devices.

    Attributes:
      compiled: the program.
      flops: useful FLOPs of the step under a budget.
    """

    compiled: Any
    state: Any
    batch: dict[str, Any]
    mesh: Any
    slots: int
    rows: int
    flops: Callable[[tuple[bool, ...]], float]

    def run(self, bits: Sequence[bool]) -> Any:
        """Runs one step under a budget; returns its loss on the devices."""
        import jax
        import jax.numpy as jnp

        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.batch, jnp.asarray(bits, bool), jnp.float32(1e-5))
        return metrics["loss"]

    def budgets(self) -> dict[str, tuple[bool, ...]]:
        """Returns the measured budgets, cheapest first."""
        from visor_jax.budget import by_count

        bits = by_count(self.slots)
        return {"empty": bits[0], f"{min(2, self.slots)} slots": bits[min(2, self.slots)], "full": bits[-1]}


def training_step(tiny: bool) -> TrainingStep:
    """Compiles the step, and makes random parameters and a batch of full rows."""
    import jax

    from visor_jax.config import architecture, stage_config
    from visor_jax.scale.mesh import configured_mesh
    from visor_jax.scale.sharding import place_batch
    from visor_jax.train.ahead import abstract_step
    from visor_jax.train.optimizer import build_optimizer
    from visor_jax.train.state import initial_state
    from visor_jax.train.step_cost import StepCost
    from visor_jax.workdir.folder import Workdir

    rows = rows_per_device(tiny) * jax.device_count()
    config, sample = step_config(tiny, rows)
    arch, mesh, settings = architecture(config, "full"), configured_mesh(config), stage_config(config, "full")
    step = abstract_step(config, "full", mesh)
    with jax.set_mesh(mesh):
        compiled = step.update.lower(step.state, step.batch, step.budget, step.learning_rate).compile()
    state, _ = initial_state(config, "full", arch, build_optimizer(settings), mesh, Workdir("unused"))
    cost = StepCost.of(arch, state, settings.objective)
    batch = place_batch(random_batch(step.batch, sample, arch.text.vocab_size), mesh)

    def flops(bits: tuple[bool, ...]) -> float:
        return cost.work([[sample]] * rows, bits).teraflops * 1e12

    return TrainingStep(compiled, state, batch, mesh, arch.num_slots, rows, flops)


def step_config(tiny: bool, rows: int) -> tuple[Any, Any]:
    """Returns the configuration of the step with so many rows, and the `Content` of each row."""
    from visor_jax.config import as_config, load_config
    from visor_jax.data.collate import Content
    from visor_jax.testing import tiny_config

    start = {"stage_overrides.full.init_from": "", "data.batch_size": rows}
    if tiny:
        config = as_config(tiny_config({**start, "stages": ("full",)}))
        return config, Content("random", config.data.tiles, config.data.visual_length, config.data.text_length)
    lengths = {"data.tiles": TILES, "data.visual_length": 7296, "data.text_length": TEXT}
    config = load_config(CONFIG, [f"{name}={value}" for name, value in (start | lengths).items()])
    return config, Content("random", TILES, VISUAL, TEXT)


def rows_per_device(tiny: bool) -> int:
    """Returns rows that fit beside the optimizer state: 4 with at least 60 GB, 2 with at least 30 GB, else 1."""
    import jax

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return 1 if tiny or limit < 30e9 else 2 if limit < 60e9 else 4


def random_batch(shapes: dict[str, Any], sample: Any, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns a batch of one sample in each row: its picture first, then its text, the second half of it targets."""
    rng = np.random.default_rng(0)
    arrays = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    arrays["tiles"] = rng.integers(0, 256, arrays["tiles"].shape, np.uint8)
    visual, text = np.arange(sample.visual), np.arange(sample.text)
    arrays["visual_gather"][:, visual, 0] = visual
    arrays["visual_weights"][:, visual, 0] = 1.0
    arrays["visual_positions"][:, visual] = visual
    arrays["visual_segments"][:, visual] = 1
    arrays["text_tokens"] = rng.integers(0, vocab_size, arrays["text_tokens"].shape, np.int32)
    arrays["text_positions"][:, text] = sample.visual + text
    arrays["text_segments"][:, text] = 1
    arrays["loss_mask"][:, sample.text // 2 : sample.text] = True
    arrays["turn_index"][:] = -1
    arrays["turn_index"][:, sample.text // 2 : sample.text] = 0
    return arrays


def step(report: Report) -> None:
    """Seconds and MFU of the training step under each budget."""
    import jax

    from visor_jax.scale.peaks import peak_flops

    training, peak = training_step(report.tiny), peak_flops(jax.devices()[0].device_kind)
    for name, bits in training.budgets().items():
        times = harness.interleaved({name: harness.timed(partial(training.run, bits))}, 2 if report.tiny else ROUNDS)
        low, middle, high = harness.quartiles(times[name])
        flops = training.flops(bits)
        row = {"budget": name, "rows": training.rows, "seconds": middle, "seconds_quartiles": [low, high]}
        row |= {"teraflops": flops / 1e12, "loss": float(training.run(bits))}
        if peak is not None:
            row["mfu"] = flops / (middle * peak * jax.device_count())
        report.add(row)


def memory(report: Report) -> None:
    """Bytes of the training step's program, and the peak in use so far after a step under each budget."""
    import jax

    training = training_step(report.tiny)
    sizes = training.compiled.memory_analysis()
    program = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    program -= sizes.alias_size_in_bytes
    for name, bits in training.budgets().items():
        loss = float(training.run(bits))
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        peak = max((x for x in peaks if x is not None), default=None)
        row = {"budget": name, "rows": training.rows, "peak_bytes": peak, "program_bytes": program}
        report.add({**row, "temporary_bytes": sizes.temp_size_in_bytes, "loss": loss})


# --- inference --------------------------------------------------------------------------------------------------------


def prefill(report: Report) -> None:
    """Prefill and time to first token, of transformers too if it runs on the same device."""
    import prefill as comparison

    device, visual, rounds = report.facts["platform"], ([9] if report.tiny else [7290, 2929]), 2 if report.tiny else 3
    missing = without_transformers(device)
    arguments = ["--device", device, "--text", "60", *(["--tiny"] if report.tiny else [])]
    frameworks = ("jax",) if missing else ("torch", "jax")
    if missing:
        report.facts["transformers"] = f"not measured: {missing}"
    slots = (0,) if report.tiny else (8, 2, 0)
    names = [("dense", "jax", "dense"), *((f"{n} slots", "jax", f"{n} slots") for n in slots)]
    if not missing:
        names.insert(0, (comparison.THEIRS, "torch", "dense"))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the two frameworks share a GPU's memory
    for length in visual:
        if not report.has_time(0.0 if length == visual[0] else 60.0, f"{length} visual tokens"):
            break
        args = argparse.Namespace(visual=[length], rounds=rounds)
        times = comparison.measured(args, arguments, frameworks, slots)
        for name, framework, kind in names:
            seconds = np.array([row[f"{framework}|{kind}|{length}"] for row in times])
            first = seconds + comparison.tiles_of(length) * np.array([row[f"{framework}|tower|1"] for row in times])
            row = {"name": name, "visual": length, "seconds": float(np.median(seconds))}
            row["seconds_to_first_token"] = float(np.median(first))
            if not missing:
                theirs = np.array([row[f"torch|dense|{length}"] for row in times])
                row["faster"] = float(np.median(theirs / seconds))
            report.add(row)


def without_transformers(device: str) -> str:
    """Returns why transformers cannot run on the device; "" if it can."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if device == "tpu":
        return "torch does not run on TPUs without torch_xla"
    if device == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "this torch has no CUDA"
    return ""


def specialized(report: Report) -> None:
    """The decoder that takes the budget as an input against programs specialized to one budget."""
    import specialize

    shape = ["--tiny", "--visual=9", "--repeats=2"]
    if not report.tiny:
        shape = [f"--config={CONFIG}", "--visual=2929", "--dtype=bfloat16", f"--repeats={ROUNDS}"]
        shape += ["--slots", "2", "8", "0"]
    for budget, row in specialize.rows(specialize.parsed(["--text=64", *shape])):
        seconds = {name: row[f"{name}_seconds_quartiles"][1] for name in ("dynamic", "specialized")}
        facts = {"overhead": row["overhead_quartiles"][1], "max_difference": row["max_difference"]}
        report.add({"budget": budget, **seconds, **facts})
        if len(report.rows) < 3 and not report.has_time(25.0, f"budgets after {budget}"):
            break


PARTS: dict[str, Callable[[Report], None]] = {
    "kernels": kernels,
    "step": step,
    "prefill": prefill,
    "memory": memory,
    "specialize": specialized,
}


def device_facts() -> dict[str, Any]:
    """Returns the devices of the figures."""
    import jax

    return {**harness.device_facts(), "platform": jax.default_backend(), "devices": jax.device_count()}


def facts_of_a_process() -> dict[str, Any]:
    """Returns `device_facts` of another process, which gives the devices back when it ends."""
    command = [sys.executable, "-c", "import accelerator, json; print(json.dumps(accelerator.device_facts()))"]
    here = Path(__file__).resolve().parent
    output = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a quick check")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0, help="cases that do not fit into them are left out")
    args = parser.parse_args(argv)
    report = Report(args.part, args.out, args.tiny, args.seconds)
    # The workers of `prefill` need the devices, so this process must not take them.
    report.facts = facts_of_a_process() if args.part == "prefill" else device_facts()
    report.write("running")
    PARTS[args.part](report)
    report.write("done")


if __name__ == "__main__":
    main()
